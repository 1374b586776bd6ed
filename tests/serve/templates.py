"""Small templates in the shape of the well-known ones, and a tokenizer that has their markers."""

import json

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from fathom.data import Tokenizer

CONTROL = ("<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<|python_tag|>", "<｜tool▁calls▁begin｜>")

HERMES = """\
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}Call with <tool_call>{"name": …, "arguments": …}</tool_call><|im_end|>
{% endif %}
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}
    {%- if m.reasoning_content %}{{ '<think>\\n' + m.reasoning_content + '\\n</think>\\n' }}{% endif %}
    {%- if '</think>' in m.content %}{{ m.content.split('</think>')[-1].lstrip('\\n') }}
    {%- else %}{{ m.content }}{% endif %}
    {%- for call in m.tool_calls or [] %}
        {{- '\\n<tool_call>\\n' + call.function.name + (call.function.arguments | tojson) + '\\n</tool_call>' }}
    {%- endfor %}
{%- else %}{{ m.content }}{% endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
"""
"""Qwen 3: the model opens its own tag, and an empty pair stands for off."""

LLAMA = """\
{{- bos_token }}
{%- if tools %}Functions, to be called as {"name": …, "parameters": …}: {{ tools | tojson }}{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role }}

{{ m.content | trim }}<|im_end|>{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant

{% endif %}
"""
"""Without think tags."""


def with_template(tokenizer: Tokenizer, template: str | None) -> Tokenizer:
    """`tokenizer` with the markers of these templates, and `template`."""
    backend = Backend.from_str(json.dumps(json.loads(tokenizer.backend.to_str())))
    backend.add_tokens([AddedToken(text, normalized=False, special=False) for text in CONTROL])
    return Tokenizer(backend, bos_token_id=0, eos_token_ids=(1,), pad_token_id=2, chat_template=template)
