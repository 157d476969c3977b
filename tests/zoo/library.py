"""Tiny models of the transformers library."""

from __future__ import annotations

from zoo.data import MASK, D, T, V

SIZES = {"num_hidden_layers": 4, "hidden_size": D, "num_attention_heads": 4, "intermediate_size": 64}


def library(name, **options):
    """A model of the library from a tiny configuration."""
    import transformers as t

    text = {**SIZES, "vocab_size": V, "max_position_embeddings": T}
    picture = {"num_channels": 1, "num_labels": 10}
    image = {**SIZES, "image_size": 8, "patch_size": 2, **picture}
    small = {
        "gpt2": (t.GPT2LMHeadModel, t.GPT2Config, {"n_layer": 4, "n_embd": D, "n_head": 4, "vocab_size": V, "n_positions": T}),
        "bert": (t.BertForMaskedLM, t.BertConfig, {**text, "vocab_size": MASK + 1}),
        "llama": (t.LlamaForCausalLM, t.LlamaConfig, {**text, "num_key_value_heads": 2}),
        "vit": (t.ViTForImageClassification, t.ViTConfig, image),
        "neox": (t.GPTNeoXForCausalLM, t.GPTNeoXConfig, text),
        "roberta": (t.RobertaForMaskedLM, t.RobertaConfig, {**text, "vocab_size": MASK + 1, "max_position_embeddings": T + 2, "pad_token_id": 1}),
        "mixtral": (t.MixtralForCausalLM, t.MixtralConfig, {**text, "num_hidden_layers": 2, "num_key_value_heads": 2, "num_local_experts": 4}),
        "mamba": (t.MambaForCausalLM, t.MambaConfig, {"vocab_size": V, "hidden_size": D, "num_hidden_layers": 3, "state_size": 4, "expand": 1}),
        "deit": (t.DeiTForImageClassification, t.DeiTConfig, image),
        "bert-model": (t.BertModel, t.BertConfig, {**text, "num_hidden_layers": 3}),
        "t5": (t.T5ForConditionalGeneration, t.T5Config, {"vocab_size": V, "d_model": D, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4, "decoder_start_token_id": 0}),
        "distilbert": (t.DistilBertForMaskedLM, t.DistilBertConfig, {"vocab_size": MASK + 1, "dim": D, "n_layers": 3, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": T}),
        "opt": (t.OPTForCausalLM, t.OPTConfig, {"vocab_size": V, "hidden_size": D, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 64, "max_position_embeddings": T, "word_embed_proj_dim": D}),
        "resnet": (t.ResNetForImageClassification, t.ResNetConfig, {**picture, "embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 2], "layer_type": "basic"}),
        "convnext": (t.ConvNextForImageClassification, t.ConvNextConfig, {**picture, "num_stages": 2, "hidden_sizes": [16, 32], "depths": [2, 2], "patch_size": 2}),
        "swin": (t.SwinForImageClassification, t.SwinConfig, {**picture, "image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}),
    }  # fmt: skip
    model, config, values = small[name]
    return model(config(**values, **{"bos_token_id": 0, "eos_token_id": 0, **options})).train()
