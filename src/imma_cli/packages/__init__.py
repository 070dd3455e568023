"""Other people's packages: where one comes from, installing and removing it with pip, and what it brings."""
