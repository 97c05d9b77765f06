"""Prints what the demo model's KV profile is made from: documents and tasks it was trained on, nothing held out.

python -m tools.demo_profile_text > sample.txt
penstock profile-kv models/demo --text sample.txt --max-tokens 65536 --key-factors 1,0.25,1,1
"""

from random import Random

from tools.demo_corpus import load_documents
from tools.demo_tasks import TRAINING_KINDS, Conversation, training_conversation
from tools.demo_tokenizer import ASSISTANT, BOS, END, SYSTEM, USER

NUM_ROUNDS = 14
DOCUMENTS_PER_ROUND = 8
RECALL_TOKENS = (512, 1536)
TASK_TOKENS = 128


def main() -> None:
    rng = Random("profile")
    documents = load_documents(held_out=False)
    for _ in range(NUM_ROUNDS):
        for document in rng.sample(documents, DOCUMENTS_PER_ROUND):
            print(BOS + document)
        lengths = [("recall", length) for length in RECALL_TOKENS] + [
            (kind, TASK_TOKENS) for kind in TRAINING_KINDS
        ]
        for kind, num_tokens in lengths:
            print(BOS + render(training_conversation(rng, kind, num_tokens=num_tokens)), end="")


def render(conversation: Conversation) -> str:
    """As the chat template writes it."""
    parts = [f"{SYSTEM}{conversation.system}{END}"] if conversation.system is not None else []
    parts += [f"{USER}{turn.question}{END}{ASSISTANT}{turn.answer_text}{END}" for turn in conversation.turns]
    return "".join(parts)


if __name__ == "__main__":
    main()
