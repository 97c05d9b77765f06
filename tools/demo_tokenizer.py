"""The demo model's tokenizer:

byte-level BPE, each digit by itself, five special tokens and a chat template.
"""

import json
import string
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tools.demo_corpus import load_documents

VOCAB_SIZE = 2560
MAX_POSITIONS = 4096
BOS = "<|endoftext|>"  # also between documents
SYSTEM = "<|system|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
END = "<|end|>"  # ends every message, and so a completion
SPECIAL_TOKENS = (BOS, SYSTEM, USER, ASSISTANT, END)  # their ids are 0..4
# A word or a digit takes one blank before it; digits and line ends are never joined to what follows them.
# A run of blanks is tried from its first one only: else a million blanks at a line's end would cost their square.
PRE_TOKENS = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\n|(?<! ) +(?=\S)|\s"
WORD_WEIGHT = 600  # makes each of the tasks' words and digits one token, with and without a blank before it

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('the roles are system, user and assistant, not ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def load_words() -> tuple[str, ...]:
    """The words that the tasks are made of, frequent in the corpus; each is one token."""
    return tuple(Path(__file__).with_name("demo_words.txt").read_text(encoding="utf-8").split())


def train_tokenizer() -> Tokenizer:
    """Trains on the training side of the corpus only, so that held-out perplexity is fair."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    units = [*load_words(), *string.digits]
    words = ["\n".join(f"{unit}\n {unit}" for unit in units)] * WORD_WEIGHT
    tokenizer.train_from_iterator([*load_documents(held_out=False), *words], trainer)
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json as transformers reads them."""
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_POSITIONS,
        "bos_token": BOS,
        "eos_token": END,
        "pad_token": BOS,
        "additional_special_tokens": [SYSTEM, USER, ASSISTANT],
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
