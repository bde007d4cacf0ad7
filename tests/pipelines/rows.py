"""The pipeline classes that are tried, and what their annotations do not say."""

import torch
from diffusers import ModelMixin
from torch import nn

from tests.pipelines.build import Row
from tests.pipelines.encoders import HIDDEN, eyes

CLIP_IMAGES, CLIP_EYES = eyes("CLIPVisionModelWithProjection", "CLIPVisionConfig", "CLIPImageProcessor")
SIGLIP_IMAGES, SIGLIP_EYES = eyes("SiglipVisionModel", "SiglipVisionConfig", "SiglipImageProcessor")
SDXL_UNET = {
    "cross_attention_dim": 64, "attention_head_dim": (2, 4), "transformer_layers_per_block": (1, 1),
    "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
}  # fmt: skip
COGVIDEO = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "clip_sample": False,
            "snr_shift_scale": 3.0, "timestep_spacing": "trailing"}  # fmt: skip
DYNAMIC = {"use_dynamic_shifting": True}
UMT5 = {"text_encoder": "UMT5EncoderModel"}
SHORT = {"tokenizer_max_length": 32}
HUNYUAN15 = {"tokenizer_max_length": 140, "vision_num_semantic_tokens": 4}
DEEP = {"base_dim": 2, "dim_mult": [1] * 6, "num_res_blocks": 0, "temperal_downsample": [False] * 5}  # of a megapixel
EIGHTH = {"block_out_channels": (8,) * 4, "down_block_types": ("DownEncoderBlock2D",) * 4,
          "up_block_types": ("UpDecoderBlock2D",) * 4}  # fmt: skip
WIDE = {"latent_channels": 16}
I2V_WAN = {"in_channels": 4 + 2 + 4}


class SafetyChecker(ModelMixin):
    """Cosmos insists on one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def check_text_safety(self, text: str) -> bool:
        """Every text is safe."""
        return True

    def check_video_safety(self, video: object) -> object:
        """The video as it is."""
        return video


ROWS = (
    # ---- text to image
    Row(pipeline="StableDiffusionPipeline", scheduler="PNDMScheduler", scheduler_options={"skip_prk_steps": True}),
    Row(pipeline="StableDiffusionXLPipeline", denoiser=SDXL_UNET),
    Row(pipeline="StableDiffusion3Pipeline"),
    Row(pipeline="FluxPipeline", guided=None, scheduler_options=DYNAMIC),
    Row(pipeline="Flux2Pipeline", guided=None, scheduler_options=DYNAMIC),
    Row(pipeline="Flux2KleinPipeline", scheduler_options=DYNAMIC),
    Row(pipeline="Flux2KleinKVPipeline", guided=None, scheduler_options=DYNAMIC),
    Row(pipeline="QwenImagePipeline", scheduler_options=DYNAMIC),
    Row(pipeline="ZImagePipeline", unguided=0.0),
    Row(pipeline="ChromaPipeline"),
    Row(pipeline="SanaPipeline", size=32),
    Row(pipeline="SanaSprintPipeline", size=32, scheduler="SCMScheduler", denoiser={"guidance_embeds": True}),
    Row(pipeline="PixArtAlphaPipeline"),
    Row(pipeline="PixArtSigmaPipeline"),
    Row(pipeline="Lumina2Pipeline"),
    Row(pipeline="LuminaPipeline"),
    Row(pipeline="AuraFlowPipeline"),
    Row(pipeline="HunyuanDiTPipeline"),
    Row(pipeline="HunyuanImagePipeline"),
    Row(pipeline="CogView3PlusPipeline", scheduler="CogVideoXDDIMScheduler", scheduler_options=COGVIDEO),
    Row(pipeline="CogView4Pipeline", scheduler_options={**DYNAMIC, "time_shift_type": "linear"}),
    Row(pipeline="HiDreamImagePipeline", classes={"text_encoder": "LongCLIP", "text_encoder_2": "LongCLIP"},
        attributes={"default_sample_size": 8}),
    Row(pipeline="Kandinsky3Pipeline"),
    Row(pipeline="Kandinsky5T2IPipeline", attributes={"resolutions": [(16, 16)]}),
    Row(pipeline="Krea2Pipeline", unguided=0.0, parts={"text_encoder_select_layers": (0, 1)}),
    Row(pipeline="NucleusMoEImagePipeline"),
    Row(pipeline="OvisImagePipeline"),
    Row(pipeline="PRXPipeline"),
    Row(pipeline="BriaPipeline"),
    Row(pipeline="BriaFiboPipeline"),
    Row(pipeline="LongCatImagePipeline", denoiser={"in_channels": 64}, vae=WIDE, attributes=SHORT),
    Row(pipeline="ErnieImagePipeline"),
    Row(pipeline="OmniGenPipeline"),
    Row(pipeline="Cosmos2TextToImagePipeline", parts={"safety_checker": SafetyChecker()}),
    Row(pipeline="KolorsPipeline"),
    Row(pipeline="IFPipeline", denoiser={"in_channels": 3, "out_channels": 6}),
    Row(pipeline="LatentConsistencyModelPipeline", denoiser={"time_cond_proj_dim": 32}),
    Row(pipeline="StableDiffusionPAGPipeline"),
    Row(pipeline="GlmImagePipeline"),
    # ---- text to video
    Row(pipeline="WanPipeline", group="video", frames=5, classes=UMT5),
    Row(pipeline="WanPipeline", group="video", frames=5, classes=UMT5, second=True, parts={"boundary_ratio": 0.8},
        name="Wan 2.2 A14B"),
    Row(pipeline="HunyuanVideoPipeline", group="video", frames=5, unguided=None),
    Row(pipeline="HunyuanVideo15Pipeline", group="video", frames=5, attributes=HUNYUAN15),
    Row(pipeline="Kandinsky5T2VPipeline", group="video", frames=5),
    Row(pipeline="LTXPipeline", group="video", frames=9, size=32),
    Row(pipeline="LTX2Pipeline", group="video", frames=9, size=32),
    Row(pipeline="MochiPipeline", group="video", frames=7),
    Row(pipeline="CogVideoXPipeline", group="video", frames=9, scheduler="CogVideoXDDIMScheduler",
        scheduler_options=COGVIDEO),
    Row(pipeline="AllegroPipeline", group="video", frames=8,
        attributes={"vae.kernel": (8, 16, 16), "vae.stride": (8, 16, 16)}),
    Row(pipeline="LattePipeline", group="video", frames=2, denoiser={"video_length": 2}),
    Row(pipeline="EasyAnimatePipeline", group="video", frames=5),
    Row(pipeline="SanaVideoPipeline", group="video", frames=5, size=32, classes={"vae": "AutoencoderKLWan"}),
    Row(pipeline="SkyReelsV2Pipeline", group="video", frames=5),
    Row(pipeline="MotifVideoPipeline", group="video", frames=5),
    Row(pipeline="TextToVideoSDPipeline", group="video", frames=2),
    Row(pipeline="AnimateDiffPipeline", group="video", frames=2),
    Row(pipeline="CosmosTextToWorldPipeline", group="video", frames=5, parts={"safety_checker": SafetyChecker()}),
    # ---- editing
    Row(pipeline="FluxKontextPipeline", group="edit", guided=None, scheduler_options=DYNAMIC),
    Row(pipeline="QwenImageEditPipeline", group="edit", size=128, vae=DEEP, scheduler_options=DYNAMIC),
    Row(pipeline="QwenImageEditPlusPipeline", group="edit", size=128, vae=DEEP, scheduler_options=DYNAMIC),
    Row(pipeline="Kandinsky5I2IPipeline", group="edit", attributes={"resolutions": [(16, 16)]}, vae=EIGHTH,
        denoiser={"visual_cond": True}),
    Row(pipeline="StableDiffusionInstructPix2PixPipeline", group="edit", denoiser={"in_channels": 8}),
    Row(pipeline="StableDiffusionXLInstructPix2PixPipeline", group="edit", denoiser={**SDXL_UNET, "in_channels": 8}),
    Row(pipeline="LongCatImageEditPipeline", group="edit", denoiser={"in_channels": 64}, vae=WIDE, attributes=SHORT),
    Row(pipeline="FluxControlPipeline", group="edit", guided=None, denoiser={"in_channels": 32, "out_channels": 16}),
    Row(pipeline="FluxFillPipeline", group="edit", guided=None, denoiser={"in_channels": 48, "out_channels": 16}),
    Row(pipeline="FluxKontextInpaintPipeline", group="edit", guided=None, scheduler_options=DYNAMIC),
    Row(pipeline="CogView4ControlPipeline", group="edit", denoiser={"in_channels": 8},
        scheduler_options={**DYNAMIC, "time_shift_type": "linear"}),
    Row(pipeline="StableDiffusionInpaintPipeline", group="edit", denoiser={"in_channels": 9}, size=32),
    Row(pipeline="StableDiffusionXLInpaintPipeline", group="edit", denoiser={**SDXL_UNET, "in_channels": 9}, size=32),
    Row(pipeline="StableDiffusionImg2ImgPipeline", group="edit"),
    Row(pipeline="StableDiffusionControlNetPipeline", group="edit", size=32),
    Row(pipeline="StableDiffusionXLControlNetPipeline", group="edit", size=32, denoiser=SDXL_UNET),
    Row(pipeline="FluxControlNetPipeline", group="edit", guided=None, scheduler_options=DYNAMIC),
    Row(pipeline="QwenImageControlNetPipeline", group="edit", scheduler_options=DYNAMIC),
    Row(pipeline="StableDiffusionAdapterPipeline", group="edit", size=32),
    Row(pipeline="StableDiffusionXLAdapterPipeline", group="edit", size=32, denoiser=SDXL_UNET),
    Row(pipeline="QwenImageInpaintPipeline", group="edit", scheduler_options=DYNAMIC),
    # ---- image to video
    Row(pipeline="WanImageToVideoPipeline", group="image to video", frames=5, classes=UMT5, denoiser=I2V_WAN),
    Row(pipeline="WanImageToVideoPipeline", group="image to video", frames=5, classes=UMT5, denoiser=I2V_WAN,
        second=True, parts={"boundary_ratio": 0.8}, name="WanImageToVideo 2.2 A14B"),
    Row(pipeline="CogVideoXImageToVideoPipeline", group="image to video", frames=9, denoiser={
        "in_channels": 8, "use_rotary_positional_embeddings": True, "use_learned_positional_embeddings": True},
        scheduler="CogVideoXDDIMScheduler", scheduler_options=COGVIDEO),
    Row(pipeline="LTXImageToVideoPipeline", group="image to video", frames=9, size=32),
    Row(pipeline="Kandinsky5I2VPipeline", group="image to video", frames=5),
    Row(pipeline="HunyuanVideo15ImageToVideoPipeline", group="image to video", frames=5,
        attributes={**HUNYUAN15, "vision_num_semantic_tokens": 16, "target_size": 16},
        parts={"image_encoder": SIGLIP_EYES, "feature_extractor": SIGLIP_IMAGES}),
    Row(pipeline="HunyuanSkyreelsImageToVideoPipeline", group="image to video", frames=5, denoiser={"in_channels": 8}),
    Row(pipeline="SkyReelsV2ImageToVideoPipeline", group="image to video", frames=5,
        denoiser={**I2V_WAN, "image_dim": HIDDEN, "added_kv_proj_dim": HIDDEN},
        parts={"image_encoder": CLIP_EYES, "image_processor": CLIP_IMAGES}),
    Row(pipeline="SanaImageToVideoPipeline", group="image to video", frames=5, size=32,
        classes={"vae": "AutoencoderKLWan"}),
    Row(pipeline="StableVideoDiffusionPipeline", group="image to video", frames=2),
    Row(pipeline="LTX2ImageToVideoPipeline", group="image to video", frames=9, size=32),
    # ---- without prompts
    Row(pipeline="DDPMPipeline", group="nothing", size=None, guided=None),
    Row(pipeline="DDIMPipeline", group="nothing", size=None, guided=None),
    Row(pipeline="DiTPipeline", group="nothing", size=None),
)  # fmt: skip
