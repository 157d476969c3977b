"""Tiny models of the transformers library that the first zoo does not use."""

from __future__ import annotations

from zoo.outside.data import BYTES, LENGTH, WORDS

WIDTH = 48


def hub(name, **options):
    """A model of the library from a tiny configuration."""
    import transformers as t

    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 96}
    text = {**sizes, "vocab_size": BYTES, "max_position_embeddings": LENGTH}
    said = {**sizes, "vocab_size": WORDS, "max_position_embeddings": LENGTH, "embedding_size": WIDTH}
    image = {"num_channels": 3, "image_size": 16, "patch_size": 4, "num_labels": 10}
    small = {
        "mistral": (t.MistralForCausalLM, t.MistralConfig, {**text, "num_key_value_heads": 2, "sliding_window": 16}),
        "qwen2": (t.Qwen2ForCausalLM, t.Qwen2Config, {**text, "num_key_value_heads": 4}),
        "qwen3": (t.Qwen3ForCausalLM, t.Qwen3Config, {**text, "num_key_value_heads": 2, "head_dim": 16}),
        "gemma": (t.GemmaForCausalLM, t.GemmaConfig, {**text, "num_key_value_heads": 1, "head_dim": 12}),
        "phi": (t.PhiForCausalLM, t.PhiConfig, text),
        "bloom": (t.BloomForCausalLM, t.BloomConfig, {"vocab_size": WORDS, "hidden_size": WIDTH, "n_layer": 4, "n_head": 4}),
        "falcon": (t.FalconForCausalLM, t.FalconConfig, {**text, "multi_query": True}),
        "gptj": (t.GPTJForCausalLM, t.GPTJConfig, {"vocab_size": BYTES, "n_embd": WIDTH, "n_layer": 3, "n_head": 4, "n_positions": LENGTH, "rotary_dim": 8}),
        "electra": (t.ElectraForMaskedLM, t.ElectraConfig, said),
        "albert": (t.AlbertForMaskedLM, t.AlbertConfig, said),
        "mpnet": (t.MPNetForMaskedLM, t.MPNetConfig, {**said, "max_position_embeddings": LENGTH + 2}),
        "deberta": (t.DebertaForMaskedLM, t.DebertaConfig, {**said, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0}),
        "fnet": (t.FNetForMaskedLM, t.FNetConfig, {**said, "type_vocab_size": 1, "tpu_short_seq_length": 24}),
        "bart": (t.BartForConditionalGeneration, t.BartConfig, {
            "vocab_size": 24, "d_model": 32, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": LENGTH, "decoder_start_token_id": 0, "forced_eos_token_id": None}),
        "whisper": (t.WhisperForConditionalGeneration, t.WhisperConfig, {
            "vocab_size": 24, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": LENGTH,
            "decoder_start_token_id": 0, "suppress_tokens": None, "begin_suppress_tokens": None}),
        "mae": (t.ViTMAEForPreTraining, t.ViTMAEConfig, {**sizes, "num_channels": 3, "image_size": 16, "patch_size": 4, "decoder_hidden_size": 32, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 4, "decoder_intermediate_size": 64}),
        "beit": (t.BeitForImageClassification, t.BeitConfig, {**sizes, **image}),
        "dinov2": (t.Dinov2ForImageClassification, t.Dinov2Config, {**sizes, **image, "mlp_ratio": 2}),
        "mobilenet": (t.MobileNetV2ForImageClassification, t.MobileNetV2Config, {"num_channels": 3, "image_size": 16, "depth_multiplier": 0.25, "num_labels": 10}),
        "convnext2": (t.ConvNextV2ForImageClassification, t.ConvNextV2Config, {"num_channels": 3, "num_labels": 10, "num_stages": 2, "hidden_sizes": [16, 32], "depths": [2, 2], "patch_size": 2}),
        "regnet": (t.RegNetForImageClassification, t.RegNetConfig, {"num_channels": 3, "num_labels": 10, "embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 2], "groups_width": 8}),
        "poolformer": (t.PoolFormerForImageClassification, t.PoolFormerConfig, {
            "num_channels": 3, "num_labels": 10, "num_encoder_blocks": 2, "hidden_sizes": [16, 32], "depths": [2, 2], "patch_sizes": [3, 3], "strides": [2, 2], "padding": [1, 1]}),
        "segformer": (t.SegformerForImageClassification, t.SegformerConfig, {
            "num_channels": 3, "num_labels": 10, "num_encoder_blocks": 2, "hidden_sizes": [16, 32], "depths": [2, 2], "sr_ratios": [2, 1],
            "patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [2, 4], "mlp_ratios": [2, 2], "decoder_hidden_size": 32}),
    }  # fmt: skip
    model, config, values = small[name]
    return model(config(**{"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, **values, **options})).train()
