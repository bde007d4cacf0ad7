"""Holds back what libraries print that is not about the user's run, and shortens what they repeat at length.

Several of them warn while they are imported, of features that nobody asked for, and of long prompts with all their
text.
"""

import logging
import os
import sys

_NOT_ABOUT_THE_RUN = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    "torch.utils._pytree": "is an Enum subclass",
    "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao` Tensor objects",
    "diffusers.loaders.lora_base": "No LoRA keys associated to CLIPText",  # a run trains the denoiser's alone
    "diffusers.models.modeling_utils": "should be kept in float32: []",  # of single files: no modules at all
    "diffusers.loaders.peft": "No LoRA keys associated to CLIPText",
}
"""Of a logger, how the messages that are held back are known."""

_SHORTENED = ("diffusers.", "transformers.")
_LETTERS = 300


def quiet_libraries() -> None:
    """Sets the filters, before the libraries are imported; where nobody watches, their progress bars stay away too."""
    for name, phrase in _NOT_ABOUT_THE_RUN.items():
        logging.getLogger(name).addFilter(_Without(phrase))
    if logging.getLogRecordFactory() is logging.LogRecord:
        logging.setLogRecordFactory(_short_record)
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # ours say for themselves when they are shown


class _Without(logging.Filter):
    """Lets through what has not a phrase in it."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is shown."""
        return self.name not in record.getMessage()


def _short_record(*args: object, **keywords: object) -> logging.LogRecord:
    record = logging.LogRecord(*args, **keywords)  # type: ignore[arg-type]
    if record.name.startswith(_SHORTENED) and len(record.getMessage()) > _LETTERS:
        record.msg, record.args = f"{record.getMessage()[:_LETTERS]}...", ()
    return record
