# ruff: noqa: E501 (templates are kept in the lines that they are read in)
"""Chat templates as the families write them (shortened, not simplified), and what must be learnt of a conversation."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    name: str
    template: str
    learnt: list[str]
    """Of :data:`TALK` (or ``messages``), one string for each assistant turn that is learnt."""
    messages: list[dict[str, Any]] = field(default_factory=list)
    masked: int = 0
    end_of_turn: str | None = "<|im_end|>"
    tools: list[dict[str, Any]] | None = None


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


TALK = [
    user("Who steers?"),
    assistant("The cook.\nHe also\n\n  rows."),
    user("And why?"),
    assistant("Because 🙂 über alles"),
]
ONE, TWO = TALK[1]["content"], TALK[3]["content"]

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{- bos_token }}{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}"
    "{%- endif %}{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content']|trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system_message = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}{{- 'Today Date: ' + date_string + '\n\n' }}"
    "{{- system_message }}{{- '<|eot_id|>' }}"
    "{%- for message in messages %}"
    "{%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}"
    "{%- elif 'tool_calls' in message %}{%- set tool_call = message.tool_calls[0].function %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}"
    "{{- '{\"name\": \"' + tool_call.name + '\", ' }}{{- '\"parameters\": ' }}{{- tool_call.arguments | tojson }}"
    "{{- '}' }}{{- '<|eot_id|>' }}"
    "{%- else %}{{- '<|start_header_id|>ipython<|end_header_id|>\n\n' }}{{- message.content }}{{- '<|eot_id|>' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
QWEN3 = (
    "{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}"
    "{%- for message in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}"
    "{%- if ns.multi_step_tool and message.role == 'user' %}"
    "{%- set ns.multi_step_tool = false %}{%- set ns.last_query_index = index %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}{%- set content = message.content %}"
    "{%- if message.role == 'user' or message.role == 'system' %}"
    "{{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}"
    "{%- elif message.role == 'assistant' %}{%- set reasoning_content = '' %}"
    "{%- if message.reasoning_content is string %}{%- set reasoning_content = message.reasoning_content %}"
    "{%- elif '</think>' in content %}"
    "{%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{%- if loop.index0 > ns.last_query_index %}{%- if loop.last or (not loop.last and reasoning_content) %}"
    "{{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' "
    "+ content.lstrip('\n') }}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\n' + content }}{%- endif %}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\n' + content }}{%- endif %}{{- '<|im_end|>\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)
QWEN25 = (
    "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>system\nYou are Qwen.<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{%- if (message.role == 'user') or (message.role == 'system' and not loop.first) "
    "or (message.role == 'assistant' and not message.tool_calls) %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{%- elif message.role == 'assistant' %}{{- '<|im_start|>' + message.role }}"
    "{%- if message.content %}{{- '\n' + message.content }}{%- endif %}"
    "{%- for tool_call in message.tool_calls %}{%- set tool_call = tool_call.function %}"
    '{{- \'\n<tool_call>\n{"name": "\' }}{{- tool_call.name }}{{- \'", "arguments": \' }}'
    "{{- tool_call.arguments | tojson }}{{- '}\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\n' }}"
    "{%- elif message.role == 'tool' %}{{- '<|im_start|>user\n<tool_response>\n' }}{{- message.content }}"
    "{{- '\n</tool_response><|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + '</s>'}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
PHI3 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}"
)
PHI2_PLAIN = (
    "{% for message in messages %}{{ message['role'].capitalize() + ': ' + message['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + '</s>' }}\n{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + '</s>' }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
TULU = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '<|user|>\n' + message['content'] + '\n' }}"
    "{% elif message['role'] == 'assistant' %}{% if not loop.last %}"
    "{{ '<|assistant|>\n'  + message['content'] + '</s>' + '\n' }}"
    "{% else %}{{ '<|assistant|>\n'  + message['content'] + '</s>' }}{% endif %}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
DEEPSEEK_R1 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{'<|User|>' + message['content']}}"
    "{% elif message['role'] == 'assistant' %}{% set content = message['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{'<|Assistant|>' + content + '</s>'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|Assistant|><think>\n'}}{% endif %}"
)
GPT_OSS = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '<|start|>user<|message|>' + message['content'] + '<|end|>' }}"
    "{% elif loop.last and not add_generation_prompt %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + message['content'] + '<|return|>' }}"
    "{% else %}{{ '<|start|>assistant<|channel|>final<|message|>' + message['content'] + '<|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VICUNA = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + message['content'] + '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CALL = {"type": "function", "function": {"name": "row", "arguments": {"speed": 3}}}
TOOL_TALK = [
    user("Row!"),
    assistant("", tool_calls=[CALL]),
    {"role": "tool", "content": "rowing"},
    assistant("We row."),
]
THOUGHT = assistant("<think>\nIt floats.\n</think>\n\nA ship.")

FAMILIES = [
    Family("smollm2", SMOLLM2, [f"{ONE}<|im_end|>", f"{TWO}<|im_end|>"]),
    Family("qwen2.5", QWEN25, [f"{ONE}<|im_end|>", f"{TWO}<|im_end|>"]),
    Family(
        "qwen2.5 with a tool",
        QWEN25,
        ['<tool_call>\n{"name": "row", "arguments": {"speed": 3}}\n</tool_call><|im_end|>', "We row.<|im_end|>"],
        TOOL_TALK,
    ),
    # The last answer gets an empty thought, which the model must write; the one before is written otherwise.
    Family("qwen3", QWEN3, [f"<think>\n\n</think>\n\n{TWO}<|im_end|>"], masked=1),
    Family(
        "qwen3 that thought",
        QWEN3,
        ["<think>\nIt floats.\n</think>\n\nA ship.<|im_end|>"],
        [user("What?"), THOUGHT, user("What?"), THOUGHT],
        masked=1,
    ),
    Family("llama 3", LLAMA3, [f"{ONE}<|eot_id|>", f"{TWO}<|eot_id|>"], end_of_turn="<|eot_id|>"),
    Family(
        "llama 3 that trims",
        LLAMA3,
        ["Aye.<|eot_id|>"],
        [{"role": "system", "content": " Be brief. "}, user("Ready?"), assistant("  Aye. \n")],
        end_of_turn="<|eot_id|>",
    ),
    Family(
        "llama 3 with a tool",
        LLAMA3,
        ['{"name": "row", "parameters": {"speed": 3}}<|eot_id|>', "We row.<|eot_id|>"],
        TOOL_TALK,
        end_of_turn="<|eot_id|>",
    ),
    Family("mistral", MISTRAL, [f" {ONE}</s>", f" {TWO}</s>"], end_of_turn="</s>"),
    Family("gemma", GEMMA, [f"{ONE}<end_of_turn>", f"{TWO}<end_of_turn>"], end_of_turn="<end_of_turn>"),
    Family("phi 3", PHI3, [f"{ONE}<|end|>", f"{TWO}<|end|>"], end_of_turn="<|end|>"),
    Family("no end token", PHI2_PLAIN, [f" {ONE}", f" {TWO}"], end_of_turn=None),
    # The header's line break comes after the generation prompt: the model has to write it.
    Family("zephyr", ZEPHYR, [f"{ONE}</s>", f"{TWO}</s>"], end_of_turn="</s>"),
    Family("tulu", TULU, [f"{ONE}</s>", f"{TWO}</s>"], end_of_turn="</s>"),
    Family("deepseek r1", DEEPSEEK_R1, [f"{ONE}</s>", f"{TWO}</s>"], end_of_turn="</s>"),
    Family("deepseek r1, <t", DEEPSEEK_R1, ["<table></s>"], [user("Go"), assistant("<table>")], end_of_turn="</s>"),
    Family(
        "gpt-oss",
        GPT_OSS,
        [f"<|channel|>final<|message|>{ONE}", f"<|channel|>final<|message|>{TWO}<|return|>"],
        end_of_turn="<|return|>",
    ),
    Family("marked", MARKED, [f"{ONE}<|im_end|>", f"{TWO}<|im_end|>"]),
    Family("vicuna", VICUNA, [f" {ONE}</s>", f" {TWO}</s>"], end_of_turn="</s>"),
    # Without a message before it the template has no default system prompt to write: found by the header alone.
    Family(
        "speaks first", SMOLLM2, ["Aye?<|im_end|>", "No.<|im_end|>"], [assistant("Aye?"), user("?"), assistant("No.")]
    ),
    Family("user has the last word", SMOLLM2, ["Aye.<|im_end|>"], [user("?"), assistant("Aye."), user("Bye")]),
    Family(
        "two in a row", SMOLLM2, ["Aye.<|im_end|>", "Aye!<|im_end|>"], [user("?"), assistant("Aye."), assistant("Aye!")]
    ),
]
