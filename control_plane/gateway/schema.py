"""The bodies of requests, as OpenAI defines them, with vLLM's extensions.

A field that OpenAI knows and this server does not support is declared with the type of its harmless values alone; a
field declared as inactive
is accepted and changes nothing; any other field is refused.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024
MAX_CHOICES_PER_PROMPT = 16
MAX_TOP_LOGPROBS = 20
MAX_PROMPTS = 2048  # OpenAI's
MAX_PROMPT_TOKENS = 2**20  # no window is longer
MAX_LOGIT_BIASES = 1024
MAX_METADATA = 16
MAX_MESSAGES = 10_000
INT64_MIN, UINT64_MAX = -(2**63), 2**64 - 1
INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1


def _at_most(limit: int) -> BeforeValidator:
    """Refuses a large list or object before its elements are looked at one by one.

    Not part of the JSON schema: these bounds protect the server, and a smaller one, such as the window, comes first.
    """

    def check(value: object) -> object:
        if isinstance(value, list | dict) and len(value) > limit:
            raise ValueError(f"at most {limit} elements are accepted")
        return value

    return BeforeValidator(check)


def _encodable(text: str) -> str:
    """JSON can escape halves of surrogate pairs, and no tokenizer takes them.

    For strings without a bound: pydantic itself refuses them where it has to count characters.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} is half of a surrogate pair") from None
    return text


TokenId = Annotated[int, Field(ge=0, le=INT32_MAX)]
# Lists give up at their first bad element: to collect a million errors would take minutes.
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True), _at_most(MAX_PROMPT_TOKENS)]
AnyText = Annotated[str, AfterValidator(_encodable)]
Text = Annotated[str, Field(min_length=1)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Stop = StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)]
Prompts = (
    Annotated[list[Text], Field(min_length=1, fail_fast=True), _at_most(MAX_PROMPTS)]
    | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True), _at_most(MAX_PROMPTS)]
)
TokenKey = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,8})$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
LogitBias = Annotated[dict[TokenKey, Bias], _at_most(MAX_LOGIT_BIASES)]
Metadata = Annotated[dict[AnyText, AnyText], Field(max_length=MAX_METADATA), _at_most(MAX_METADATA)]


class _Body(BaseModel):
    # Strict: "1" is no number. Unknown fields are refused, as OpenAI does.
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(None, description="Accepted; no obfuscation is ever added.")


class _SampledBody(_Body):
    """What chat and plain completions share."""

    model: AnyText
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES_PER_PROMPT)
    max_tokens: int | None = Field(None, ge=1, le=INT32_MAX)
    stop: Stop | None = None
    seed: int | None = Field(None, ge=INT64_MIN, le=UINT64_MAX)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: LogitBias | None = Field(None, description="Token ids as strings to biases.")
    stream: bool | None = None
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")
    # Extensions, named as in vLLM where it has them.
    top_k: int | None = Field(None, ge=-1, le=INT32_MAX, description="0 and -1 keep all tokens.")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.001, le=1000)
    min_tokens: int | None = Field(None, ge=0, le=INT32_MAX)
    ignore_eos: bool | None = None
    stop_token_ids: list[TokenId] | None = Field(None, max_length=64)
    priority: int | None = Field(None, ge=INT32_MIN, le=INT32_MAX, description="Lower is sooner.")
    cache_salt: str | None = Field(
        None, max_length=256, description="Requests share cached prefixes only with equal salts."
    )
    deadline_s: float | None = Field(
        None, gt=0, le=86400, description="Seconds within which the first token is wanted."
    )
    # Accepted and inactive.
    user: AnyText | None = None


class TextPart(_Body):
    type: Literal["text"]
    text: AnyText


class ChatMessage(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: AnyText | Annotated[list[TextPart], Field(fail_fast=True), _at_most(MAX_MESSAGES)]
    name: AnyText | None = None
    refusal: None = None
    audio: None = None
    tool_calls: None = None
    function_call: None = None


Messages = Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True), _at_most(MAX_MESSAGES)]


class TextFormat(_Body):
    type: Literal["text"]


class ChatCompletionRequest(_SampledBody):
    messages: Messages
    max_completion_tokens: int | None = Field(None, ge=1, le=INT32_MAX)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS, description="Only with logprobs.")
    add_generation_prompt: bool | None = None
    # Accepted and inactive.
    metadata: Metadata | None = None
    parallel_tool_calls: bool | None = None
    prompt_cache_key: AnyText | None = None
    prompt_cache_retention: AnyText | None = None
    safety_identifier: AnyText | None = None
    service_tier: AnyText | None = None
    # Unsupported beyond these values.
    audio: None = None
    function_call: Literal["none"] | None = None
    functions: Annotated[list[None], Field(max_length=0)] | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    reasoning_effort: None = None
    response_format: TextFormat | None = None
    store: Literal[False] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    tools: Annotated[list[None], Field(max_length=0)] | None = None
    verbosity: None = None
    web_search_options: None = None


class CompletionRequest(_SampledBody):
    prompt: Text | TokenIds | Prompts
    echo: bool | None = Field(None, description="Not together with logprobs.")
    logprobs: int | None = Field(None, ge=0, le=5)
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES_PER_PROMPT, description="Only equal to n.")
    # Unsupported beyond this value.
    suffix: None = None


class TokenizeRequest(_Body):
    """Either prompt or messages."""

    model: AnyText | None = None
    prompt: AnyText | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = Field(
        None, description="Default: true for a prompt, false for messages."
    )
    add_generation_prompt: bool | None = None


class DetokenizeRequest(_Body):
    model: AnyText | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True), _at_most(MAX_PROMPT_TOKENS)]
