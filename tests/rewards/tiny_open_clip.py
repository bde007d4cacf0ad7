"""A CLIP of open_clip with random weights and small layers, written to disk in every form that is loaded."""

import json

import torch

CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
NAME = "tiny-clip-of-the-tests"


def write_tiny_clip(folder, *, seed=0):
    """Registers the architecture and writes `weights.pt`, `wrapped.pt`, `folder/`; returns the network."""
    import open_clip
    from safetensors.torch import save_file

    configs = folder / "configs"
    configs.mkdir()
    (configs / f"{NAME}.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(configs)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = open_clip.create_model(NAME).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2.0)  # random small weights barely see the picture
    tensors = network.state_dict()
    torch.save(tensors, folder / "weights.pt")
    torch.save({"state_dict": {f"module.{name}": value for name, value in tensors.items()}}, folder / "wrapped.pt")
    local = folder / "folder"
    local.mkdir()
    save_file({name: value.contiguous() for name, value in tensors.items()}, local / "open_clip_model.safetensors")
    (local / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {}}))
    return network
