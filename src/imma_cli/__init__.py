"""imma: harden the weights of text-to-image models against malicious fine-tuning."""

__version__ = "0.1.0"
