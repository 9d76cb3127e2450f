"""The tiny base before it is trained: tokenizer, text encoder, VAE and UNet in Stable Diffusion's layout, of a few MB."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from compdiff.diffusion import Diffusion


def word_tokenizer(corpus: Sequence[str], folder: Path, length: int) -> CLIPTokenizer:
    """A CLIP tokenizer whose merges make each word of `corpus` one token; digits and unknown words fall to bytes."""
    words = sorted({w for text in corpus for w in "".join(c if c.isalpha() else " " for c in text.lower()).split()})
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=10_000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(words, trainer)
    learned = json.loads(bpe.to_str())["model"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = dict.fromkeys([*letters, *(c + "</w>" for c in letters), *sorted(learned["vocab"], key=learned["vocab"].get)])
    tokens |= dict.fromkeys(["<|startoftext|>", "<|endoftext|>"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in learned["merges"])]) + "\n")
    return CLIPTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=length)


def build_tiny(corpus: Sequence[str], folder: Path, size: int = 64, seed: int = 0, width: int = 64) -> Diffusion:
    """An untrained tiny base: 4x-down 4-channel grey VAE, three-level UNet, two-layer CLIP text encoder.

    `width`: of the context, 16 at least; the others follow it.
    """
    torch.manual_seed(seed)
    length, groups = 48, min(8, width // 4)
    tokenizer = word_tokenizer(corpus, folder, length)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=length, projection_dim=width, hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    vae = AutoencoderKL(
        in_channels=1, out_channels=1, block_out_channels=(width // 4, width // 2, width), layers_per_block=1, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=groups, sample_size=size,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=size // 4, in_channels=4, out_channels=4, block_out_channels=(width // 2, width, 2 * width), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4, cross_attention_dim=width, norm_num_groups=groups, use_linear_projection=True,
    )  # fmt: skip
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        prediction_type="v_prediction", timestep_spacing="leading", steps_offset=1,
    )  # fmt: skip
    encoder = CLIPTextModel(text)
    with torch.no_grad():  # one word among 48 tokens must count from the first step: distinct words, peaked attention
        encoder.get_input_embeddings().weight.normal_(0, 0.5)
        for name, weight in unet.named_parameters():
            if name.endswith("weight") and ".attn2." in name:
                weight *= 3 if ".to_q." in name or ".to_k." in name else 2
    return Diffusion(tokenizer, encoder, vae, unet, scheduler)
