"""A tokenizer and a chat template that write in transformers' processors what Chiasm's processor writes."""

import copy
from typing import Any

from tokenizers import processors
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from chiasm.data.chat import IMAGE_TOKEN, PLAIN_TEMPLATE, parts, render
from chiasm.data.processor import ChiasmProcessor
from chiasm.interop.parts import BEGUN, DONE, HEAD, TAIL

GATHER = (
    BEGUN + "{%- for message in messages -%}"
    "{%- set words = namespace(text='') -%}"
    "{%- if message['content'] is string -%}{%- set words.text = message['content'] -%}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}"
    "{%- set words.text = words.text + '<image>' + ('' if loop.last else '\n') -%}"
    "{%- else -%}{%- set words.text = words.text + part['text'] -%}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- set gathered.messages = gathered.messages + [dict(message, content=CONTENT)] -%}"
    "{%- endfor -%}" + DONE
)
"""In front of a template for texts: parts become one text, with `<image>` and a line break for a picture."""

SPREAD = (
    BEGUN + "{%- for message in messages -%}"
    "{%- set content = message['content'] -%}"
    "{%- if content is string -%}{%- set content = [{'type': 'text', 'text': content}] -%}{%- endif -%}"
    "{%- set gathered.messages = gathered.messages + [dict(message, content=content)] -%}"
    "{%- endfor -%}" + DONE
)
"""In front of a template that walks over parts: a content that is a text becomes one."""

CONTENTS = ("words.text", "[{'type': 'text', 'text': words.text}]")
"""How a message's text is given to the template that follows: as a string, or as the only part."""

_USER: dict[str, Any] = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}
_ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}
_MORE = {"role": "user", "content": [{"type": "text", "text": "Sure?"}]}

GATHER_MARKED = (
    "{%- set gathered = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- set words = namespace(text='') -%}"
    "{%- if message['content'] is string -%}{%- set words.text = message['content'] -%}"
    "{%- else -%}{%- for part in message['content'] -%}{%- set words.text = words.text + part['text'] -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- if '<__media_' in words.text -%}{%- set words.text = words.text | replace('__>', '__>\n') -%}"
    "{%- if words.text.endswith('__>\n') -%}{%- set words.text = words.text[:-1] -%}{%- endif -%}{%- endif -%}"
    "{%- set gathered.messages = gathered.messages + [dict(message, content=CONTENT)] -%}"
    "{%- endfor -%}"
    "{%- set messages = gathered.messages -%}{{ '' }}"
)
"""The same for llama.cpp, which gives a text with a mark of its own, `<__media_...__>`, where a picture stands."""

GATHER_SHOWN = (
    "{%- set gathered = namespace(messages=[], mark='') -%}"
    "{%- for message in messages -%}"
    "{%- set words = namespace(text='', parts=[]) -%}"
    "{%- if message['content'] is string -%}{%- set words.text = message['content'] -%}"
    "{%- else -%}{%- for part in message['content'] -%}{%- set words.text = words.text + part['text'] -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- for piece in words.text.split('<__media_') -%}"
    "{%- set rest = piece -%}"
    "{%- if not loop.first -%}"
    "{%- set gathered.mark = '<__media_' + piece.split('__>')[0] + '__>' -%}"
    "{%- set words.parts = words.parts + [{'type': 'image'}] -%}"
    "{%- set rest = piece.split('__>')[1] -%}"
    "{%- endif -%}"
    "{%- if rest -%}{%- set words.parts = words.parts + [{'type': 'text', 'text': rest}] -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- set gathered.messages = gathered.messages + [dict(message, content=words.parts)] -%}"
    "{%- endfor -%}"
    "{%- set messages = gathered.messages -%}"
    "{% set prompt %}OWN{% endset %}{{ prompt | replace('PICTURE', gathered.mark) }}"
)
"""For a template that places pictures itself: its parts are made again of llama.cpp's text and its marks."""

MARK = "<__media_0__>"

PROBES: tuple[list[dict[str, Any]], ...] = ([_USER], [_MORE], [_USER, _ANSWER, _MORE])


def portable_template(processor: ChiasmProcessor) -> str:
    """A chat template that writes of parts what Chiasm writes of them, and of contents that are texts.

    Raises:
        ValueError: neither the tokenizer's own template does, nor one with a prelude.
    """
    words = processor.tokenizer
    own = words.get_chat_template() if words.chat_template else PLAIN_TEMPLATE
    preludes = ("", SPREAD, *(GATHER.replace("CONTENT", content) for content in CONTENTS))
    templates = [(prelude + own).replace(IMAGE_TOKEN, processor.image_token) for prelude in preludes]
    wanted = [_expected(processor, probe) for probe in PROBES]
    for forms in ((parts, _said), (parts,)):
        for template in templates:
            if all([_render(words, template, form(probe)) for probe in PROBES] == wanted for form in forms):
                return template
    raise ValueError(
        "the chat template writes a picture in a way that no template for transformers' processors was found for; "
        f"give the tokenizer a chat_template that writes {IMAGE_TOKEN} for image parts"
    )


def marked_template(processor: ChiasmProcessor) -> str:
    """A chat template for llama.cpp that writes what Chiasm writes.

    Raises:
        ValueError: none was found.
    """
    words, token = processor.tokenizer, processor.image_token
    own = words.get_chat_template() if words.chat_template else PLAIN_TEMPLATE
    marked = [[{**message, "content": _marked(message["content"])} for message in probe] for probe in PROBES]
    wanted = [_expected(processor, probe).replace(token, MARK) for probe in PROBES]
    gathered = [GATHER_MARKED.replace("CONTENT", content) + own for content in CONTENTS]
    shown = GATHER_SHOWN.replace("PICTURE", token).replace("OWN", own.replace(IMAGE_TOKEN, token))
    for template in (*gathered, shown):
        if [_render(words, template, probe) for probe in marked] == wanted:
            return template
    raise ValueError(
        "the chat template writes a picture in a way that no template for llama.cpp was found for; "
        f"give the tokenizer a chat_template for texts, in which {IMAGE_TOKEN} and a line break stand for a picture"
    )


def _marked(content: list[dict[str, str]]) -> str:
    return "".join(MARK if part["type"] == "image" else part["text"] for part in content)


def portable_tokenizer(processor: ChiasmProcessor) -> PreTrainedTokenizerBase:
    """The tokenizer, which adds a beginning of text by itself only where Chiasm's processor has it do so, and pads
    batches as answers need it: on the left, or on the right of an encoder."""
    words = copy.deepcopy(processor.tokenizer)
    plain = words("a", add_special_tokens=False)["input_ids"]
    if not processor.add_special_tokens and words("a")["input_ids"] != plain:
        words.backend_tokenizer.post_processor = processors.Sequence([])
    words.chat_template, words.padding_side = None, "right" if processor.encoder_decoder else "left"
    words.init_kwargs["padding_side"] = words.padding_side  # which alone is written
    return words


def name_tokens(words: PreTrainedTokenizerBase, tokens: dict[str, str]) -> None:
    """Gives tokens the names by which another processor asks a tokenizer for them, in its files too."""
    new = {name: token for name, token in tokens.items() if getattr(words, name, None) != token}
    words.SPECIAL_TOKENS_ATTRIBUTES = [*words.SPECIAL_TOKENS_ATTRIBUTES, *new]
    for name, token in new.items():
        setattr(words, name, token)


def _said(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same conversation with texts for contents that are words alone."""
    contents = [(turn, turn["content"]) for turn in parts(messages)]
    return [{**turn, "content": said[0]["text"] if len(said) == 1 else said} for turn, said in contents]


def _expected(processor: ChiasmProcessor, messages: list[dict[str, Any]]) -> str:
    text = render(processor.tokenizer, messages, add_generation_prompt=True, find=False).text
    return text.replace(IMAGE_TOKEN, processor.image_token)


def _render(words: PreTrainedTokenizerBase, template: str, messages: list[dict[str, Any]]) -> str | None:
    try:
        rendered, _ = render_jinja_template(
            [messages], chat_template=template, add_generation_prompt=True, **words.special_tokens_map
        )
    except Exception:  # templates raise whatever they like
        return None
    return rendered[0]


def writes(processor: ChiasmProcessor, template: str) -> bool:
    """Whether a processor's prompts of one turn are what a template writes of parts."""
    words = processor.tokenizer
    return all(_render(words, template, parts(probe)) == _expected(processor, probe) for probe in PROBES[:2])


def without_ending(processor: ChiasmProcessor, ending: str) -> str:
    """A chat template that leaves out the last `ending`, for processors that write it behind everything.

    Raises:
        ValueError: the model's prompts do not end with it.
    """
    texts = [_expected(processor, probe) for probe in PROBES]
    if unlike := next((text for text in texts if not text.endswith(ending)), None):
        raise ValueError(
            f"the other processor ends prompts with {ending!r}, this model's chat template with {unlike[-16:]!r}; "
            f"give the tokenizer a chat_template that ends with {ending!r}"
        )
    return f"{HEAD}{portable_template(processor)}{TAIL}{{{{ prompt[:-{len(ending)}] }}}}"


ONE_PICTURE = (
    "{% set pictures = prompt.split('<image>') | length - 1 %}"
    "{% if pictures > 1 or (pictures and not prompt.startswith('<image>')) %}"
    "{{ raise_exception(\"KIND's processor puts one picture in front of all words; a conversation with more, or with "
    "words in front of it, is for Chiasm's own server\") }}{% endif %}"
)
"""Behind a prompt: what the other processor would write in another order is refused."""

ONE_TURN = (
    "{% if pictures and messages | length > 1 %}"
    "{{ raise_exception(\"KIND's processor takes all words for the instruction; a conversation of several turns is for "
    "Chiasm's own server\") }}{% endif %}"
)
"""The same where the connector reads the last question alone."""


def words_behind_pictures(processor: ChiasmProcessor, kind: str, instructed: bool) -> PreTrainedTokenizerBase:
    """A tokenizer for processors that put a picture in front of everything and read the prompt as an instruction too:
    its chat template writes neither pictures nor the marks around a text, which the tokenizer adds, and refuses
    conversations that would be read in another order.

    Args:
        kind: of checkpoint, for what is refused.
        instructed: whether the connector reads the prompt.

    Raises:
        ValueError: the model's prompts have pictures elsewhere.
    """
    words, texts = portable_tokenizer(processor), []
    for probe in PROBES:
        text = _expected(processor, probe)
        bare = text.replace(processor.image_token, "")
        if text != processor.image_token * text.count(processor.image_token) + bare:
            raise ValueError(
                f"{kind}'s processor puts a picture in front of the prompt, this model's chat template inside of it; "
                "connect with a chat_template that begins with <image>"
            )
        texts.append(bare)
    begin, end = words.bos_token, words.eos_token
    begin = begin if begin and all(text.startswith(begin) for text in texts) else ""
    end = end if end and all(text.endswith(end) for text in texts) else ""
    if instructed and texts[0].removeprefix(begin).removesuffix(end).strip() != _USER["content"][1]["text"]:
        raise ValueError(
            f"{kind}'s processor reads the whole prompt as the instruction, this model the question alone; "
            "connect with a chat_template that writes a question and nothing around it"
        )
    if begin or end:
        ids = [(mark, words.convert_tokens_to_ids(mark)) for mark in {begin, end} - {""}]
        framed = " ".join(filter(None, [begin, "$A", end]))
        words.backend_tokenizer.post_processor = processors.TemplateProcessing(single=framed, special_tokens=ids)
    kept = f"[{len(begin)}:{-len(end) if end else ''}]"
    template = portable_template(processor).replace(processor.image_token, "<image>")
    refusals = (ONE_PICTURE + (ONE_TURN if instructed else "")).replace("KIND", kind)
    words.chat_template = f"{HEAD}{template}{TAIL}{refusals}{{{{ (prompt | replace('<image>', '')){kept} }}}}"
    return words
