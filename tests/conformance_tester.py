"""What Transformers' own test mixins need to know of Mask-LLaVA; run by `.ci/run` where the conformance kit is present.

`Tester` passes stored objects with embeddings (the processor's default mode), `ModelInversionTester` boxes whose masks
the model inverts.
"""

import zlib

import torch
from transformers import CLIPVisionConfig, LlamaConfig
from transformers.models.llava.image_processing_llava import LlavaImageProcessor

from mask_llava_hf import (
    ImageObjects,
    MaskLlavaConfig,
    MaskLlavaForConditionalGeneration,
    MaskLlavaModel,
    MaskLlavaProcessor,
)
from mask_llava_hf.processing.object_settings import ObjectSettings
from mask_llava_hf.processing.vision_towers import fingerprint_settings
from mask_llava_hf.testing import CHAT_TEMPLATE, tiny_tokenizer


NUM_OBJECTS = 3


class Tester:
    model_type = "mask_llava"
    config_class = MaskLlavaConfig
    base_model_class = MaskLlavaModel
    conditional_generation_class = MaskLlavaForConditionalGeneration
    processor_class = MaskLlavaProcessor
    image_token = "<image>"
    chat_template = CHAT_TEMPLATE
    generate_variants = [{}, {"max_object_tokens": 0}, {"max_object_tokens": 1}]
    skip: dict[str, str] = {}

    batch_size = 3
    num_hidden_layers = 2
    hidden_size = 32
    num_attention_heads = 4
    num_key_value_heads = 4
    intermediate_size = 37
    vocab_size = 99
    image_size = 8
    patch_size = 2
    patch_grid_size = 2
    num_image_tokens = 1 + patch_grid_size**2 + NUM_OBJECTS
    image_token_index = 0
    pad_token_id = 60  # the overfitting test learns ids 1..19, which must not be the frozen padding row
    is_training = True
    use_labels = True
    mask_inversion = "processor"

    def __init__(self, parent=None):
        self.parent = parent
        self.seq_length = 7 + self.num_image_tokens
        self.encoder_seq_length = self.seq_length

    @classmethod
    def make_config(cls, **text_overrides) -> MaskLlavaConfig:
        text = {
            "vocab_size": cls.vocab_size,
            "hidden_size": cls.hidden_size,
            "num_hidden_layers": cls.num_hidden_layers,
            "num_attention_heads": cls.num_attention_heads,
            "num_key_value_heads": cls.num_key_value_heads,
            "intermediate_size": cls.intermediate_size,
            "max_position_embeddings": 512,
            "pad_token_id": cls.pad_token_id,
            "bos_token_id": 61,
            "eos_token_id": 62,
        }
        vision = CLIPVisionConfig(
            image_size=cls.image_size,
            patch_size=cls.patch_size,
            hidden_size=32,
            projection_dim=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=37,
            attention_dropout=0.1,
        )
        return MaskLlavaConfig(
            text_config=LlamaConfig(**{**text, **text_overrides}),
            vision_config=vision,
            image_token_index=cls.image_token_index,
            vision_feature_layer=-1,
            patch_grid_size=cls.patch_grid_size,
            max_object_tokens=NUM_OBJECTS,
        )

    def get_config(self) -> MaskLlavaConfig:
        return self.make_config()

    def prepare_config_and_inputs_for_common(self):
        generator = torch.Generator().manual_seed(torch.randint(0, 2**31, ()).item())
        pixel_values = torch.rand(self.batch_size, 3, self.image_size, self.image_size, generator=generator)
        input_ids = torch.randint(4, self.pad_token_id, (self.batch_size, self.seq_length), generator=generator)
        input_ids[:, : self.num_image_tokens] = self.image_token_index
        return self.get_config(), {
            "pixel_values": pixel_values,
            "object_counts": torch.full((self.batch_size,), NUM_OBJECTS),
            **self.object_inputs(generator),
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
        }

    def object_inputs(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return {"object_embeds": torch.randn(self.batch_size, NUM_OBJECTS, 32, generator=generator)}

    @classmethod
    def make_tokenizer(cls):
        return tiny_tokenizer()

    @classmethod
    def make_image_processor(cls):
        side = {"height": cls.image_size, "width": cls.image_size}
        return LlavaImageProcessor(size=side, crop_size=side, do_pad=False)

    @classmethod
    def processor_kwargs(cls):
        return {
            "object_settings": ObjectSettings(
                max_object_tokens=NUM_OBJECTS,
                patch_grid_size=cls.patch_grid_size,
                embed_size=32,
                image_size=cls.image_size,
                mask_source="boxes",
                mask_inversion=cls.mask_inversion,
            ).to_dict(),  # all keys, since the processor saves all
            "chat_template": cls.chat_template,
        }

    @classmethod
    def make_processor(cls):
        return cls.processor_class(
            image_processor=cls.make_image_processor(), tokenizer=cls.make_tokenizer(), **cls.processor_kwargs()
        )

    @classmethod
    def make_model_for(cls, processor, seed=0, **overrides):
        tokenizer = processor.tokenizer
        torch.manual_seed(seed)
        config = cls.make_config(
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **overrides,
        )
        config.image_token_index = processor.image_token_id
        return cls.conditional_generation_class(config).eval()

    @staticmethod
    def boxes_of(image) -> torch.Tensor:
        """NUM_OBJECTS boxes that depend on the image alone."""
        generator = torch.Generator().manual_seed(zlib.crc32(image.tobytes()))
        size = torch.tensor([image.width, image.height], dtype=torch.float32)
        corners = torch.rand(NUM_OBJECTS, 2, generator=generator) * size * 0.5
        return torch.cat([corners, corners + size * 0.4], dim=1)

    @classmethod
    def objects_of(cls, image) -> ImageObjects:
        generator = torch.Generator().manual_seed(zlib.crc32(image.tobytes()))
        return ImageObjects(
            boxes_xyxy=cls.boxes_of(image),
            scores=torch.ones(NUM_OBJECTS),
            image_hw=(image.height, image.width),
            embeddings=torch.randn(NUM_OBJECTS, 32, generator=generator),
            embedding_fingerprint=fingerprint_settings(cls.make_config(), cls.make_image_processor()),
        )

    @classmethod
    def processor_call_kwargs(cls, images):
        return {"objects": [cls.objects_of(image) for image in images]}

    @classmethod
    def chat_block_extra(cls, images):
        return {"objects": cls.objects_of(images[0])}


class ModelInversionTester(Tester):
    mask_inversion = "model"
    skip = {
        "contract::test_forward_traces_as_one_graph": "which masks are empty decides what MaskInversion computes, so "
        "making embeddings inside the model does not trace; `Tester` checks the graph with embeddings"
    }

    def object_inputs(self, generator):
        masks = torch.rand(self.batch_size, NUM_OBJECTS, self.image_size, self.image_size, generator=generator) > 0.5
        return {"object_masks": masks.to(torch.uint8)}

    @classmethod
    def processor_call_kwargs(cls, images):
        return {"boxes": [cls.boxes_of(image) for image in images]}

    @classmethod
    def chat_block_extra(cls, images):
        return {"boxes": cls.boxes_of(images[0]).tolist()}
