# ruff: noqa: E501, RUF001 - templates have long lines and characters of their own
"""Chats and texts are encoded by the artifact as transformers encodes them; templates cannot hang or exhaust the machine."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import transformers
from packaging.version import Version
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pmkvq_compiler.runtime.manifest import file_digest

from .test_code_that_runs import python

PACKAGE = "tiny_qwen"

# In the styles of models' own templates, each written anew.
QWEN = """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n\\nFunction signatures are inside <tools></tools>:\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and reasoning %}
            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- set call = tool_call.function if tool_call.function else tool_call %}
            {{- '\\n<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""

LLAMA = """{{- bos_token }}
{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{- "Environment: ipython\\n" }}{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}{{- "<|eot_id|>" }}
{%- if tools is not none %}
    {%- if messages | length != 0 %}
        {%- set first = messages[0]['content']|trim %}{%- set messages = messages[1:] %}
    {%- else %}{{- raise_exception("there is no first user message to put tools into") }}{%- endif %}
    {{- '<|start_header_id|>user<|end_header_id|>\\n\\nRespond with JSON.\\n\\n' -}}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
    {{- first + "<|eot_id|>"}}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}{{- raise_exception("one tool call at a time") }}{%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson }}{{- "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}{{- message.content | tojson }}
        {%- else %}{{- message.content }}{%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}{%- set loop_messages = messages[1:] %}
{%- else %}{%- set loop_messages = messages %}{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace() %}{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or message.role == "tool_results" or message.tool_calls is defined) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("After the optional system message, roles must alternate user/assistant") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}{{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}{{- '"' + key + '": "' + val + '"' }}
                    {%- else %}{{- '"' + key + '": ' + val|tojson }}{%- endif %}
                    {%- if not loop.last %}{{- ", " }}{%- endif %}
                {%- endfor %}
                {{- "}}" }}{%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" }}{%- endif %}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}{{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}{{- "[INST] " + message["content"] + "[/INST]" }}{%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function|tojson %}{{- out[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id|length != 9 %}
                {{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}
            {%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}{%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" + eos_token }}{%- endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}{{- " " + message["content"]|trim + eos_token}}
    {%- elif message["role"] == "tool" %}
        {%- set content = message.content.content if message.content is mapping else message.content %}
        {{- '[TOOL_RESULTS] {"content": ' + content|string + "}[/TOOL_RESULTS]" }}
    {%- else %}{{- raise_exception("Only user, assistant and tool roles are supported") }}{%- endif %}
{%- endfor %}"""

GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}{%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- else -%}{%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}{%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}{%- set first_user_prefix = "" -%}{%- set loop_messages = messages -%}{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}{%- set role = "model" -%}{%- else -%}{%- set role = message['role'] -%}{%- endif -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}{{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- else -%}{{ raise_exception("Invalid content type") }}{%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{'<start_of_turn>model\n'}}{%- endif -%}
"""

SMOLLM = """{# ───── defaults ───── #}
{%- if enable_thinking is not defined -%}{%- set enable_thinking = true -%}{%- endif -%}
{%- set mode = "/think" if enable_thinking else "/no_think" -%}
{{- "<|im_start|>system\\n" -}}
{%- if messages[0].role == "system" -%}
    {%- set text = messages[0].content -%}
    {%- if "/no_think" in text -%}{%- set mode = "/no_think" -%}{%- endif -%}
    {%- set custom = text.replace("/no_think", "").replace("/think", "").rstrip() -%}
{%- endif -%}
{{- "## Metadata\\n\\nToday Date: " ~ strftime_now("%d %B %Y") ~ "\\nReasoning Mode: " ~ mode ~ "\\n\\n" -}}
{%- if custom -%}{{- custom ~ "\\n\\n" -}}{%- endif -%}
{%- if xml_tools or tools -%}
    {%- set ns = namespace(xml="You may call these:\\n<tools>\\n") -%}
    {%- for tool in (xml_tools or tools) -%}{%- set ns.xml = ns.xml ~ (tool | string) ~ "\\n" -%}{%- endfor -%}
    {{- ns.xml ~ "</tools>\\n" -}}
{%- endif -%}
{{- "<|im_end|>\\n" -}}
{%- for message in messages -%}
    {%- set content = message.content if message.content is string else "" -%}
    {%- if message.role == "user" -%}{{ "<|im_start|>user\\n" + content + "<|im_end|>\\n" }}
    {%- elif message.role == "assistant" -%}
        {% generation %}
        {%- if mode == "/think" -%}{{ "<|im_start|>assistant\\n" + content.lstrip("\\n") + "<|im_end|>\\n" }}
        {%- else -%}{{ "<|im_start|>assistant\\n<think>\\n\\n</think>\\n" + content.lstrip("\\n") + "<|im_end|>\\n" }}{%- endif -%}
        {% endgeneration %}
    {%- elif message.role == "tool" -%}{{ "<|im_start|>user\\n" + content + "<|im_end|>\\n" }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {%- if mode == "/think" -%}{{ "<|im_start|>assistant\\n" }}{%- else -%}{{ "<|im_start|>assistant\\n<think>\\n\\n</think>\\n" }}{%- endif -%}
{%- endif -%}"""

DEEPSEEK = """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{%- set ns = namespace(is_first=false, is_tool=false, system_prompt='') %}
{%- for message in messages %}{%- if message['role'] == 'system' %}{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}
{{- bos_token }}{{ ns.system_prompt }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}{{'<｜User｜>' + message['content']}}{%- endif %}
    {%- if message['role'] == 'assistant' and message['content'] is none %}
        {%- set ns.is_tool = false -%}
        {%- for tool in message['tool_calls'] %}
            {%- if not ns.is_first %}
                {{- '<｜Assistant｜><｜tool▁calls▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + tool['function']['name'] }}
                {%- set ns.is_first = true -%}
            {%- else %}{{- '\\n' + tool['function']['name'] }}{%- endif %}
        {%- endfor %}
    {%- endif %}
    {%- if message['role'] == 'assistant' and message['content'] is not none and message['content'] is defined %}
        {%- set content = message['content'] %}
        {%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
        {{- '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}
    {%- endif %}
    {%- if message['role'] == 'tool' %}{%- set ns.is_tool = true -%}{{ '<｜tool▁output▁begin｜>' + message['content'] }}{%- endif %}
{%- endfor -%}
{% if add_generation_prompt and not ns.is_tool %}{{'<｜Assistant｜><think>\\n'}}{% endif %}"""

ODDS = """{%- for key in ['bos_token', 'eos_token', 'pad_token', 'unk_token', 'sep_token', 'image_token', 'add_bos_token'] %}{% endfor -%}
{{ bos_token }}|{{ eos_token }}|{{ pad_token is defined }}|{{ sep_token is defined }}|{{ add_bos_token is defined }}|{{ image_token }}
{{ tools is none }} {{ tools is defined }} {{ documents is none }} {{ add_generation_prompt }} {{ continue_final_message is defined }}
{{ messages | tojson }} {{ messages[0] | tojson(ensure_ascii=True, sort_keys=True) }}
{{ {'ü': 1, 'a': [1, 2]} | tojson(indent=2) }} {{ {'b': 1, 'a': '<&>'} | tojson(separators=(',', ':'), sort_keys=True) }}
{{ {'x': 'ö'} | tojson(True, 1, (';', '='), True) }}
{%- for n in range(9) %}{% if n == 2 %}{% continue %}{% endif %}{% if n == 5 %}{% break %}{% endif %}{{ n }}{% endfor %}
{{ dict(a=1)['a'] }} {{ dict.fromkeys([1], 2) }} {% set ns = namespace(x=1, self=2) %}{% set ns.x = ns.x + 1 %}{{ ns.x }}{{ ns.self }}
{{ strftime_now('%Y-%m-%d') }} {{ messages | map(attribute='role') | join(', ') }} {{ lipsum is defined }} {{ cycler is defined }}
{% macro twice(x) %}{{ x }}{{ x }}{% endmacro %}{{ twice('né') }} {{ 'Straße' | upper }} {{ '%05.2f' | format(3.14159) }}
{{ documents | tojson }} {{ messages[0].nothing is defined }} {{ 7 // 2 }} {{ [3, 1, 2] | sort | reverse | list }} {{ missing | default('-') }}
  {% if true %}
    indented
  {% endif %}
end"""

TEMPLATES = {
    "qwen": QWEN,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "smollm": SMOLLM,
    "deepseek": DEEPSEEK,
    "odds": ODDS,
}

USER, ANSWER = (
    {"role": "user", "content": "Où est la baleine? 🐳 <b>&</b>"},
    {"role": "assistant", "content": "Là-bas.\n"},
)
CALL: dict[str, Any] = {"name": "find", "arguments": {"what": "baleine", "size": 2.5, "ü": [None, True]}}
TOOL = {
    "type": "function",
    "function": {
        "name": "find",
        "description": 'Finds "animals", ж',
        "parameters": {"type": "object", "properties": {"what": {"type": "string"}}, "required": ["what"]},
    },
}
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [USER],
    [{"role": "system", "content": "Be brief. /no_think"}, USER],
    [USER, ANSWER, USER],
    [{"role": "system", "content": " Sei kurz. "}, USER, ANSWER, USER, ANSWER, {"role": "user", "content": ""}],
    [USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nDort."}, USER],
    [USER, {"role": "assistant", "content": "So.", "reasoning": "hm"}, USER, {"role": "assistant", "content": None, "thinking": "…"}],
    [USER, {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "id": "abcdefghi", "function": CALL}]},
     {"role": "tool", "content": '{"at": "⚓"}', "name": "find"}],
    [USER, {"role": "assistant", "content": "", "tool_calls": [{"function": CALL}, {"function": CALL}]}],
    [{"role": "user", "content": [{"type": "text", "text": " hi "}, {"type": "image"}]}],
    [ANSWER, USER],
    [{"role": "owl", "content": "hoo"}],
]  # fmt: skip
NORMALIZED = Version(transformers.__version__) >= Version("5.23")
"""Since then transformers drops what a message says None of, and knows reasoning by several names; so does the artifact."""

ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"add_generation_prompt": False},
    {"tools": [TOOL]},
    {"tools": [TOOL, TOOL], "documents": [{"title": "ж", "text": "a"}], "enable_thinking": False},
    {"enable_thinking": False, "date_string": "1 Jan 2020"},
]


def make_tokenizer(folder: Path, template: Any = None, **settings: Any) -> None:
    """A tokenizer of bytes with added tokens, special and not, stored with truncation and padding on."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: number for number, symbol in enumerate(alphabet)}
    vocabulary["he"] = len(vocabulary)
    encoder = Tokenizer(models.BPE(vocabulary, [("h", "e")]))
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder.decoder = decoders.ByteLevel()
    encoder.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<image>"])
    encoder.add_tokens([AddedToken("<think>", normalized=False), AddedToken(" lstrip", lstrip=True)])
    encoder.post_processor = processors.TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", encoder.token_to_id("<s>"))]
    )
    encoder.enable_truncation(8)
    encoder.enable_padding(length=16)
    names = {"bos_token": "<s>", "eos_token": "</s>", "extra_special_tokens": {"image_token": "<image>"}}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=encoder, **{**names, **settings})
    tokenizer.chat_template = template
    for path in (folder / "chat_template.jinja", folder / "tokenizer_config.json", folder / "tokenizer.json"):
        path.unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    stored = json.loads((folder / "tokenizer.json").read_text())
    stored["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    stored["padding"] = {"strategy": {"Fixed": 16}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                         "pad_type_id": 0, "pad_token": "!"}  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(stored))


def sign(folder: Path) -> None:
    """List the tokenizer's files as they are now."""
    manifest = json.loads((folder / "pmkvq.json").read_text())
    files = {name: digest for name, digest in manifest["files"].items() if "token" not in name and ".jinja" not in name}
    for path in (*folder.glob("*token*.json"), *folder.rglob("*.jinja")):
        files[path.relative_to(folder).as_posix()] = file_digest(path)
    (folder / "pmkvq.json").write_text(json.dumps({**manifest, "files": files}))


@pytest.fixture(scope="module")
def text_module(chat_artifact: Path) -> Iterator[Any]:
    """The artifact's own `text.py`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(chat_artifact))
        yield importlib.import_module(f"{PACKAGE}.text")
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]


@pytest.fixture
def folder(chat_artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(chat_artifact, tmp_path / "artifact"))


Open = Callable[..., Any]


@pytest.fixture
def with_template(folder: Path, text_module: Any) -> Open:
    """The artifact's tokenizer, with another template and settings."""

    def make(template: Any, **settings: Any) -> Any:
        make_tokenizer(folder, template, **settings)
        sign(folder)
        return text_module.Tokenizer(folder)

    return make


@pytest.fixture
def here(text_module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Templates are rendered in this process, which is faster; what renders them is the same program."""
    program: dict[str, Any] = {"__name__": "chat_template"}

    def render(renderer: str, template: str, variables: dict[str, Any]) -> str:
        if "answer" not in program:
            exec(renderer, program)
        request = json.loads(json.dumps({"template": template, "variables": variables, "characters": 1 << 30}))
        answer = program["answer"](request)
        if "error" in answer:
            raise text_module.ArtifactError(f"the chat template does not take these messages ({answer['error']})")
        return str(answer["text"])

    monkeypatch.setattr(text_module, "_render", render)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", TEMPLATES)
def test_chats_are_rendered_and_encoded_as_by_transformers(
    with_template: Open, folder: Path, text_module: Any, name: str
) -> None:
    own, theirs = with_template(TEMPLATES[name]), AutoTokenizer.from_pretrained(folder)
    rendered = refused = 0
    for messages in CONVERSATIONS:
        plain = not any({"reasoning", "thinking"} & message.keys() or None in message.values() for message in messages)
        for arguments in ARGUMENTS if plain or NORMALIZED else []:
            options = {"add_generation_prompt": True, **arguments}
            try:
                expected = theirs.apply_chat_template(messages, tokenize=False, **options)
            except Exception:
                with pytest.raises(text_module.ArtifactError, match="the chat template does not take these messages"):
                    own.render_chat(messages, **arguments)
                refused += 1
                continue
            assert own.render_chat(messages, **arguments) == expected
            if "tools" not in arguments:
                ids = theirs.apply_chat_template(messages, return_dict=False, **options)
                assert own.encode_chat(messages, **arguments).tolist() == [ids]
            rendered += 1
    assert rendered > 20, f"{name}: {rendered} chats were rendered, {refused} refused"


def test_a_chat_is_rendered_alike_in_a_process_of_its_own(with_template: Open, folder: Path) -> None:
    own, theirs = with_template(QWEN), AutoTokenizer.from_pretrained(folder)
    for messages, arguments in ((CONVERSATIONS[3], {}), (CONVERSATIONS[7], {"tools": [TOOL]})):
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **arguments)
        assert own.render_chat(messages, **arguments) == expected


@pytest.mark.usefixtures("here")
def test_templates_with_names_are_chosen_as_by_transformers(
    with_template: Open, folder: Path, text_module: Any
) -> None:
    named = {"default": "plain {{ messages[0].content }}", "tool_use": "tools {{ tools | tojson }}", "rag": "rag"}
    own, theirs = with_template(named), AutoTokenizer.from_pretrained(folder)
    assert (folder / "additional_chat_templates").is_dir()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for stored in ("files", "list", "dict"):
        if stored != "files":
            shutil.rmtree(folder / "additional_chat_templates", ignore_errors=True)
            (folder / "chat_template.jinja").unlink(missing_ok=True)
            pairs = [{"name": name, "template": template} for name, template in named.items()]
            chosen = pairs if stored == "list" else named
            (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": chosen}))
            sign(folder)
            own = text_module.Tokenizer(folder)
            theirs = AutoTokenizer.from_pretrained(folder) if stored == "list" else theirs
        for tools in (None, [TOOL]):
            expected = theirs.apply_chat_template([USER], tools=tools, tokenize=False, add_generation_prompt=True)
            assert own.render_chat([USER], tools) == expected


TEXTS = [
    "",
    "he",
    "The whale rose",
    "<s>he</s>",
    "<think> lstrip <|im_end|>",
    " a\n\tb ",
    "Où 🐳 ж",
    "x" * 3000,
    "\0",
    "<image>",
]


@pytest.mark.parametrize("settings", [{}, {"split_special_tokens": True}, {"clean_up_tokenization_spaces": True}])
def test_texts_are_encoded_and_decoded_as_by_transformers(
    with_template: Open, folder: Path, settings: dict[str, Any]
) -> None:
    """Truncation and padding that are stored in tokenizer.json shorten and fill nothing."""
    own, theirs = with_template(None, **settings), AutoTokenizer.from_pretrained(folder)
    assert json.loads((folder / "tokenizer.json").read_text())["truncation"] is not None
    for text in TEXTS:
        ids = theirs(text).input_ids
        assert own.encode(text).tolist() == [ids]
        assert str(own.encode(text).dtype) == "torch.int64"
        assert own.decode(own.encode(text)[0]) == theirs.decode(ids, skip_special_tokens=True)


def test_words_are_cleaned_up_where_transformers_does(folder: Path, text_module: Any, tmp_path: Path) -> None:
    encoder = Tokenizer(models.WordLevel({"do": 0, "n't": 1, ".": 2, "we": 3, "'re": 4, "[UNK]": 5}, unk_token="[UNK]"))
    encoder.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s"), "removed")
    for cleaned in (True, False):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=encoder, clean_up_tokenization_spaces=cleaned)
        tokenizer.save_pretrained(folder)
        tokenizer.save_pretrained(tmp_path / "alone")  # without a config that asks for another class
        sign(folder)
        own, theirs = text_module.Tokenizer(folder), AutoTokenizer.from_pretrained(tmp_path / "alone")
        ids = own.encode("do n't . we 're")
        assert own.decode(ids[0]) == theirs.decode(ids[0]) == ("don't. we're" if cleaned else "do n't . we 're")


BOMBS = {
    "a loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops that print": "{% for i in range(99999) %}{% for j in range(99999) %}{{ messages }}{% endfor %}{% endfor %}",
    "a product": "{{ 'a' * 10**10 }}",
    "a power": "{{ 10 ** (10 ** 10) }}",
    "doubling": "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    "a format": "{{ '%1000000000d' % 1 }}",
    "another format": "{{ '{:1000000000}'.format(1) }}",
    "center": "{{ 'a' | center(10**10) }}",
    "indent": "{{ ('a\\n' * 10**6) | indent(10**4) }}",
    "join": "{{ ([['a'] * 10**5] * 10**5) | join }}",
    "a list": "{{ [0] * 10**10 }}",
    "a macro": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "two macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a long text": "{{ 'a' * 10**8 }}",
    "replace": "{{ ('a' * 10**6).replace('a', 'a' * 10**6) }}",
    "batch": "{{ range(99999) | batch(1) | map('list') | list * 10**6 }}",
    "lipsum": "{{ lipsum(n=10**6) }}",
    "a range": "{% for i in range(10**9) %}{% endfor %}",
}


def test_a_template_cannot_hang_or_exhaust_the_machine(
    with_template: Open, text_module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_module, "RENDER_SECONDS", 2)
    tokenizer = with_template("")

    def explode(bomb: str) -> str:
        with pytest.raises(text_module.ArtifactError, match="the chat template does not take these messages") as caught:
            text_module._render(tokenizer.renderer, bomb, {"messages": [USER]})
        return str(caught.value)

    start = time.monotonic()
    with ThreadPoolExecutor(len(BOMBS)) as pool:
        reasons = list(pool.map(explode, BOMBS.values()))
    assert time.monotonic() - start < 10
    assert not any("\n" in reason for reason in reasons)
    assert any("seconds" in reason for reason in reasons)


def test_a_template_is_told_what_it_took_too_much_of(with_template: Open, text_module: Any) -> None:
    for bomb, reason in (
        ("a product", "it takes too much memory"),
        ("a long text", "it renders them to 100,000,000 characters"),
    ):
        with pytest.raises(text_module.ArtifactError, match=reason):
            with_template(BOMBS[bomb]).encode_chat([USER])


def test_the_terminal_ends_in_a_sentence_where_a_template_would_hang(folder: Path, with_template: Open) -> None:
    with_template(BOMBS["a product"])
    start = time.monotonic()
    done = python("", folder, "-m", PACKAGE, "--prompt", "Ahoy")
    assert time.monotonic() - start < 20
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"{PACKAGE}: the chat template does not take these messages (it takes too much memory)\n"


def test_a_template_may_be_replaced(with_template: Open) -> None:
    tokenizer = with_template(None)
    tokenizer.chat_template = "{{ messages[0].content }}!"
    assert tokenizer.render_chat([{"role": "user", "content": "Ahoy"}]) == "Ahoy!"


FAULTS = {
    "{{ 1 / 0 }}": "ZeroDivisionError",
    "{{ 1 + 'a' }}": "TypeError",
    "{{ messages | tojson(indent={}) }}": "TypeError",
    "{{ 'a' | int(base=99) }}{{ [] | first | upper }}{{ {}['a'].b }}": "undefined|no attribute",
    "{% if %}": "Expected an expression",
    "{% for x in messages %}": "Unexpected end of template",
    "{{ raise_exception('no\nowls') }}": "no owls",
    "{{ nothing.at.all }}": "undefined",
    "{{ ''.__class__.__mro__ }}": "unsafe|access to attribute",
    "{% set ns = namespace(_a=1) %}": "underscore",
    "{{ messages.append(1) }}": "unsafe|not safely callable",
    "{{ '%s%s' | format(1) }}": "TypeError|not enough",
    "{% include 'x' %}": "no loader|TypeError",
    "(" * 50_000 + "{{ " + "(" * 5_000: "does not take",
    "{{ [" + "[" * 50_000: "does not take",
    "{{ 10 ** 5000 }}": "ValueError|digits",
    "{{ strftime_now(1) }}": "TypeError",
    "{{ '\\ud800' }}": "cannot be encoded",
}


@pytest.mark.parametrize("template", FAULTS)
def test_whatever_a_template_raises_is_a_sentence(with_template: Open, text_module: Any, template: str) -> None:
    tokenizer = with_template(template)
    with pytest.raises((text_module.ArtifactError, text_module.InputError), match=FAULTS[template]) as caught:
        tokenizer.encode_chat([USER])
    assert "\n" not in str(caught.value)


DAMAGED: list[tuple[str, str]] = [
    ("tokenizer.json", ""),
    ("tokenizer.json", "{}"),
    ("tokenizer.json", "[1]"),
    ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"a": "b"}, "merges": [1]}}'),
    ("tokenizer.json", "\0" * 100),
    ("tokenizer_config.json", "[]"),
    ("tokenizer_config.json", "null"),
    ("tokenizer_config.json", "{"),
    ("tokenizer_config.json", '{"chat_template": 5}'),
    ("tokenizer_config.json", '{"chat_template": [{"name": "default"}]}'),
    ("tokenizer_config.json", '{"chat_template": {"default": ["a"]}}'),
    ("tokenizer_config.json", '{"a": NaN}'),
    ("tokenizer_config.json", "[" * 100_000),
]


@pytest.mark.parametrize(("name", "content"), DAMAGED)
def test_damaged_tokenizer_files_are_named(folder: Path, text_module: Any, name: str, content: str) -> None:
    (folder / "chat_template.jinja").unlink()
    (folder / name).write_text(content)
    with pytest.raises(text_module.ArtifactError, match=rf"{name} was changed after the compile"):
        text_module.Tokenizer(folder)
    sign(folder)
    with pytest.raises(text_module.ArtifactError, match=name) as caught:
        text_module.Tokenizer(folder)
    assert "\n" not in str(caught.value)


def test_odd_special_tokens_and_texts_are_no_errors_of_python(folder: Path, text_module: Any) -> None:
    settings = {
        "bos_token": {"content": "<s>"},
        "eos_token": {"no": 1},
        "pad_token": 5,
        "unk_token": None,
        "add_bos_token": True,
    }
    odd = {"extra_special_tokens": ["a"], "model_specific_special_tokens": "b"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **odd}))
    sign(folder)
    tokenizer = text_module.Tokenizer(folder)
    assert tokenizer.special_tokens == {"bos_token": "<s>"}
    for text in (None, 5, b"bytes", "\ud800", ["a"]):
        with pytest.raises(text_module.InputError, match="cannot be encoded"):
            tokenizer.encode(text)
    for messages in ([], ["hello"], [None]):
        with pytest.raises(text_module.ArtifactError):
            tokenizer.encode_chat(messages)
