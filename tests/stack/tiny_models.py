"""Tiny models with random weights in the layout of production, made offline and always the same.

python -m tests.stack.tiny_models DIR makes DIR/gemma and DIR/whisperx/align.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

POLICIES = Path(__file__).parents[2] / "inventories" / "single_node" / "policies"
HUB_NAME = "google/gemma-2-9b"  # what a published adapter says of its base; it must never be looked up


def make_gemma(gemma_dir: Path, *, sliding_window: int = 4096, softcap: float = 50.0) -> None:
    """Make gemma_dir/base, a Gemma-2 of two layers, and gemma_dir/cope-a, an adapter that matters."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Gemma2Config, Gemma2ForCausalLM

    base, adapter = gemma_dir / "base", gemma_dir / "cope-a"
    tokenizer = _tokenizer()
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=sliding_window,
        attn_logit_softcapping=softcap,
        max_position_embeddings=8192,
        # Wide enough that answers differ between texts; the usual 0.02 answers 0.500 to all.
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Gemma2ForCausalLM(config)
        model.save_pretrained(base)
        tokenizer.save_pretrained(base)
        lora = LoraConfig(
            r=8,
            lora_alpha=16,
            lora_dropout=0.0,
            task_type="CAUSAL_LM",
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            init_lora_weights=False,  # the usual B = 0 would change nothing
        )
        get_peft_model(model, lora).save_pretrained(adapter)
    settings = adapter / "adapter_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "base_model_name_or_path": HUB_NAME}, indent=1))
    for weights in gemma_dir.rglob("*.safetensors"):
        weights.chmod(0o644)


def make_aligner(whisperx_dir: Path) -> None:
    """Make whisperx_dir/align/en, a wav2vec2 CTC model, and whisperx_dir/nltk_data, a bare punkt."""
    import torch
    from transformers import (
        Wav2Vec2Config,
        Wav2Vec2CTCTokenizer,
        Wav2Vec2FeatureExtractor,
        Wav2Vec2ForCTC,
        Wav2Vec2Processor,
    )

    directory = whisperx_dir / "align" / "en"
    directory.mkdir(parents=True, exist_ok=True)
    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ETAONIHSRDLUMWCFGYPBVK'XJQZ"]
    vocabulary = directory / "vocab.json"
    vocabulary.write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    tokenizer = Wav2Vec2CTCTokenizer(str(vocabulary), word_delimiter_token="|")
    features = Wav2Vec2FeatureExtractor(1, 16_000, 0.0, do_normalize=True, return_attention_mask=False)
    Wav2Vec2Processor(features, tokenizer).save_pretrained(directory)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Wav2Vec2Config(
            vocab_size=len(letters),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            conv_dim=(32,) * 7,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
            pad_token_id=0,
        )
        Wav2Vec2ForCTC(config).save_pretrained(directory)
    punkt = whisperx_dir / "nltk_data" / "tokenizers" / "punkt_tab" / "english"
    punkt.mkdir(parents=True, exist_ok=True)
    for name in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"):
        (punkt / name).write_text("")


def _tokenizer() -> Any:
    """Byte-level BPE of 1,024 tokens with Gemma's special tokens; digits stand alone."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [path.read_text(encoding="utf-8") for path in sorted(POLICIES.glob("*.txt"))]
    tokenizer.train_from_iterator(texts, trainer)
    bos = tokenizer.token_to_id("<bos>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<start_of_turn>", "<end_of_turn>"],
        padding_side="left",
        model_max_length=8192,
        model_input_names=["input_ids", "attention_mask"],
    )


if __name__ == "__main__":
    make_gemma(Path(sys.argv[1]) / "gemma")
    make_aligner(Path(sys.argv[1]) / "whisperx")
