"""Every export format of every family that has it, read back: largest difference of a picture, and by what loader.

`python -m tests.ddpo.weights.export_table` prints the rows of the table in docs/training.md. Tiny random networks of
the families' own classes, a LoRA of rank 2 and scale 1.5 whose weights are random; pixels are in [0, 1]. kohya's file
of SD3 has no reader in diffusers: a reader of the original networks' names compares the change of every weight.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from ddpo.weights.export import lora_state, save_as_peft
from ddpo.weights.formats import merge, renamed
from tests.ddpo.weights.test_formats import FAMILIES, MMDITS, ORIGINAL, changes, own_picture, picture, tuned


def rows() -> Iterator[tuple[str, str, float, float, str]]:
    """Family, format, difference, what the LoRA changes at all, and the loader."""
    for family, build in FAMILIES.items():
        policy, layers = tuned(build)
        policy.family = family
        network, adapter = policy.denoiser.module, policy.adapter
        state = lora_state(network, adapter, policy.trainable())
        plain = picture(build())
        changed = changes(policy)
        own = own_picture(policy)
        effect = float((own - plain).abs().max())

        def seen(load: Callable, own: torch.Tensor = own, build: Callable = build) -> float:
            """The largest difference of a pixel once a stock pipeline is given a file or folder."""
            stock = build()
            with tempfile.TemporaryDirectory() as folder:
                load(stock, Path(folder))
                return float((picture(stock) - own).abs().max())

        def as_diffusers(stock: object, folder: Path, policy: object = policy) -> None:
            policy.save(folder / "lora")
            stock.load_lora_weights(str(folder / "lora"))

        def as_peft(stock: object, folder: Path, network: object = network, state: dict = state) -> None:
            save_as_peft(network, folder / "peft", state)
            name = "unet" if hasattr(stock, "unet") else "transformer"
            loaded = PeftModel.from_pretrained(getattr(stock, name), str(folder / "peft"))
            setattr(stock, name, loaded.merge_and_unload())

        def as_file(scheme: str, network: object = network, layers: dict = layers) -> Callable:
            def load(stock: object, folder: Path) -> None:
                save_file(renamed(network, layers, scheme), folder / "lora.safetensors")
                stock.load_lora_weights(str(folder / "lora.safetensors"))

            return load

        def as_merged(stock: object, folder: Path, name: str = policy.name, layers: dict = layers) -> None:
            merge(getattr(stock, name), layers)

        yield family, "diffusers", seen(as_diffusers), effect, "`pipe.load_lora_weights`"
        yield family, "peft", seen(as_peft), effect, "`peft.PeftModel.from_pretrained`"
        if family in MMDITS:
            far, largest = by_original_names(family, renamed(network, layers, "kohya"), changed, build)
            yield family, "kohya (weights)", far, largest, "a reader of the original networks' names"
        else:
            yield family, "kohya", seen(as_file("kohya")), effect, "`pipe.load_lora_weights`"
        yield family, "comfyui", seen(as_file("comfyui")), effect, "`pipe.load_lora_weights`"
        yield family, "merged", seen(as_merged), effect, "the stock network's weights"


def by_original_names(family: str, state: dict, expected: dict, build: Callable) -> tuple[float, float]:
    """The largest difference of a change of a weight, read by the original networks' names, and the largest change."""
    stock = build().transformer
    with tempfile.TemporaryDirectory() as folder:
        save_file(state, Path(folder) / "lora.safetensors")
        state = load_file(Path(folder) / "lora.safetensors")
    read = {}
    for name in {key.partition(".")[0] for key in state}:
        down, up = state[f"{name}.lora_down.weight"], state[f"{name}.lora_up.weight"]
        change = up @ down * (state[f"{name}.alpha"] / down.shape[0])
        parts = ORIGINAL[family][name.removeprefix("lora_unet_")]
        read |= dict(zip(parts, change.split([stock.get_submodule(p).weight.shape[0] for p in parts]), strict=True))
    far = max(float((read[name] - change).abs().max()) for name, change in expected.items())
    return far, max(float(change.abs().max()) for change in expected.values())


def main() -> None:
    """Prints the table."""
    print("| family | format | difference | change by the LoRA | read by |\n|---|---|---|---|---|")
    for family, name, far, effect, loader in rows():
        print(f"| {family} | {name} | {far:.1e} | {effect:.2g} | {loader} |", flush=True)


if __name__ == "__main__":
    main()
