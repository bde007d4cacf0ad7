"""The estimate of a run as text for people and as a mapping for programs."""

from collections.abc import Sequence
from dataclasses import asdict

from rewards.tools.table import aligned
from trainers.config import Config
from trainers.planning.estimate.cards import CARDS, GIB, Card
from trainers.planning.estimate.memory import Estimate

UTILISATION = 0.4


def as_text(config: Config, estimate: Estimate, *, utilisation: float = UTILISATION) -> str:
    """Tables of parts, phases and cards, without a final newline.

    Args:
        config: The run.
        estimate: Its estimate.
        utilisation: Share of a card's published peak that is assumed to be reached.
    """
    batch, model = config.batch, config.model
    elsewhere = {"text_encoders": model.offload, "vae": model.offload, "trajectories": batch.trajectories == "cpu"}
    parts = [
        [name.replace("_", " "), _gib(size), "on the CPU until needed" if elsewhere.get(name) else ""]
        for name, size in asdict(estimate.parts).items()
    ]
    of = {
        "sampling": f"{batch.sample_batch_size} samples, {_gib(estimate.per_sample['sampling'])} each",
        "decoding": f"{batch.sample_batch_size} images, {_gib(estimate.per_sample['decoding'])} each",
        "training": f"{batch.train_batch_size} {estimate.plan.unit}s, {_gib(estimate.per_sample['training'])} each",
    }
    phases = [[name, _gib(size), of.get(name, "")] for name, size in estimate.phases.items()]
    work = [[name, f"{flops / 1e15:.3f}", ""] for name, flops in estimate.flops.items()]
    cards = [_card_row(config, estimate, card, utilisation) for card in CARDS]
    heads = ["card", "usable", "fits", "sample_batch_size", "train_batch_size", "images/s", "epoch"]
    checkpointing = "with" if model.gradient_checkpointing else "without"
    return "\n".join([
        f"memory per GPU, GiB ({model.precision}, {checkpointing} gradient checkpointing)",
        _table(parts),
        "\npeak by phase, GiB",
        _table(phases),
        "\nPFLOP per epoch",
        _table(work),
        "\nlargest batches that fit, all else as configured",
        _table([heads, *cards]),
        f"\nimages/s per GPU, assuming {utilisation:.0%} of the published dense {_format(model.precision)} peak; "
        "rewards and text encoding not included.\nusable: less 0.75 GiB and 4% for the CUDA context, workspaces and "
        "fragmentation. Rewards' models are not included.",
    ])  # fmt: skip


def as_mapping(config: Config, estimate: Estimate, *, utilisation: float = UTILISATION) -> dict[str, object]:
    """The same numbers: bytes, FLOPs, and what fits on each card."""
    return {
        "bytes": asdict(estimate.parts),
        "peak_bytes": dict(estimate.phases),
        "bytes_per_sample": dict(estimate.per_sample),
        "flops_per_epoch": dict(estimate.flops),
        "utilisation": utilisation,
        "cards": {
            card.name: {
                "usable_bytes": card.usable,
                "fits": estimate.peak <= card.usable,
                "largest_sample_batch_size": estimate.largest_batch("sampling", card.usable),
                "largest_train_batch_size": estimate.largest_batch("training", card.usable),
                "images_per_second": images_per_second(config, estimate, card, utilisation),
            }
            for card in CARDS
        },
    }


def images_per_second(config: Config, estimate: Estimate, card: Card, utilisation: float) -> float:
    """Of a whole epoch, per GPU."""
    flops = sum(estimate.flops.values()) / estimate.plan.images_per_epoch
    return utilisation * card.peak(config.model.precision) / flops


def _card_row(config: Config, estimate: Estimate, card: Card, utilisation: float) -> list[str]:
    rate = images_per_second(config, estimate, card, utilisation)
    seconds = estimate.plan.samples_per_process / rate
    return [
        card.name,
        _gib(card.usable),
        "yes" if estimate.peak <= card.usable else "no",
        str(estimate.largest_batch("sampling", card.usable)),
        str(estimate.largest_batch("training", card.usable)),
        f"{rate:.3g}",
        f"{seconds:,.0f} s",
    ]


def _format(precision: str) -> str:
    return "float32" if precision == "fp32" else "bf16"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}" if size >= 0.1 * GIB else f"{size / GIB:.4f}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Indented columns: a name, numbers to the right, and in the third of three a remark."""
    right = (1,) if len(rows[0]) == 3 else range(1, len(rows[0]))
    return "\n".join(f"  {line}" for line in aligned(rows, right=right))
