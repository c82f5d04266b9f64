"""Writes what transformers makes of the constructs that chat templates use.

    python tests/chat_templates.py > protocol/src/model/tokenizer/template/corpus.json

needs transformers and jinja2; nothing is downloaded. The date is that which Velum tells every template. Each case is a
template, what is given to it, and the text that transformers writes, or that it refuses.
"""

import datetime
import json

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils


class Day(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2024, 7, 26)


chat_template_utils.datetime = Day

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": " Where's the \"lamp\"? "},
    {"role": "assistant", "content": "On the sill.\n"},
    {"role": "user", "content": "Läuft's?"},
    {"role": "assistant", "content": "Ja — gut."},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "find",
            "description": "Finds a thing, e.g. <lamp> & \"oil\"",
            "parameters": {
                "type": "object",
                "properties": {"what": {"type": "string"}, "far": {"type": "number", "default": 1.5}},
                "required": ["what"],
            },
        },
    }
]
CALLS = [
    {"role": "user", "content": "Find it."},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "find", "arguments": {"what": "lämp", "far": 2, "deep": [1, 2.0, None, True]}}}
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "name": "find", "content": "sill"},
    {"role": "assistant", "content": "On the sill.", "reasoning_content": "It said sill."},
]
PARTS = [
    {"role": "user", "content": [{"type": "text", "text": "Look "}, {"type": "image"}, {"type": "text", "text": "here"}]},
    {"role": "assistant", "content": "I do."},
]

# name, template, messages, more
CASES = [
    ("turns", "{% for m in messages %}<|{{ m.role }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}", TALK, {}),
    ("generation prompt", "{% for m in messages %}{{ m.role ~ ': ' ~ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}", TALK[:2], {"open": True}),
    ("trimmed blocks", "  {% for m in messages %}\n    {{ m.content | trim }}\n  {% endfor %}\n\n", TALK, {}),
    ("white space control", "{{- bos_token -}}\n\n{%- for m in messages -%}  {{- m.role -}}  {%+ if loop.last %} end {% endif +%} {%- endfor -%}", TALK, {}),
    ("system first", "{%- if messages[0].role == 'system' -%}{%- set sys = messages[0].content -%}{%- set rest = messages[1:] -%}{%- else -%}{%- set rest = messages -%}{%- endif -%}{% for m in rest %}[INST] {% if loop.first and sys is defined %}<<SYS>>\n{{ sys }}\n<</SYS>>\n\n{% endif %}{{ m.content }} {% endfor %}", TALK, {}),
    ("alternation", "{% for m in messages[1:] %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}{{ m.role[0] }}{% endfor %}", TALK, {}),
    ("alternation refused", "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}{{ m.role[0] }}{% endfor %}", TALK, {}),
    ("namespace", "{% set ns = namespace(last=-1, seen=[]) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% set ns.seen = ns.seen + [loop.index] %}{% endif %}{% endfor %}{{ ns.last }} {{ ns.seen }} {{ ns.seen | length }}", TALK, {}),
    ("backwards", "{% for m in messages[::-1] %}{% set i = (messages | length - 1) - loop.index0 %}{{ i }}{{ m.role[:2] }}{% endfor %}{{ messages[-1].content }}", TALK, {}),
    ("break and continue", "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{% if loop.index > 4 %}{% break %}{% endif %}{{ m.role }};{% endfor %}", TALK, {}),
    ("macro", "{% macro head(role, mark='#') %}{{ mark }}{{ role | upper }}{{ mark }}{% endmacro %}{% for m in messages %}{{ head(m.role) }}{{ head(m.role, mark='*') }}{% endfor %}", TALK, {}),
    ("call block", "{% macro turn(who) %}<{{ who }}>{{ caller() }}</{{ who }}>{% endmacro %}{% for m in messages %}{% call turn(m.role) %}{{ m.content }}{% endcall %}{% endfor %}", TALK, {}),
    ("block set and filter", "{% set all %}{% for m in messages %}{{ m.content }}{% endfor %}{% endset %}{{ all | length }}{% filter upper %}{{ all }}{% endfilter %}", TALK, {}),
    ("no tools are None", "{% if tools is not none %}tools{% endif %}{% if tools is defined %}defined{% endif %}{% if not tools %}falsy{% endif %}{{ documents is none }}{{ nothing is defined }}{{ tools }}", TALK, {}),
    ("tools as JSON", "{% for t in tools %}{{ t | tojson }}\n{{ t | tojson(indent=2) }}\n{{ t.function | tojson(indent=4) }}{% endfor %}", TALK, {"tools": TOOLS}),
    ("JSON options", "{{ messages | tojson(ensure_ascii=True) }}{{ tools[0] | tojson(separators=(',', ':'), sort_keys=True) }}{{ {} | tojson(indent=2) }}{{ [[], {}, none, 1e20, 1.5e-7, 10, -0.0] | tojson }}", TALK, {"tools": TOOLS}),
    ("values printed", "{{ tools[0].function.parameters }}|{{ [1, 2.5, 'a', \"it's\", none, true] }}|{{ 1.0 }}|{{ 3 / 2 }}|{{ 7 // 2 }}|{{ 2 ** 3 }}|{{ none }}|{{ true }}", TALK, {"tools": TOOLS}),
    ("tool calls", "{% for m in messages %}{% if m.tool_calls %}{% for c in m.tool_calls %}<call>{\"name\": \"{{ c.function.name }}\", \"arguments\": {{ c.function.arguments | tojson }}}</call>{% endfor %}{% elif m.role == 'tool' %}<out id={{ m.tool_call_id }}>{{ m.content }}</out>{% else %}{{ m.content }}{% endif %}{% endfor %}", CALLS, {}),
    ("null content is absent", "{% for m in messages %}{{ m.content is defined }},{{ m.content is none }},{{ m.content is string }};{% endfor %}", CALLS, {}),
    ("arguments item by item", "{% for c in messages[1].tool_calls %}{% for k, v in c.function.arguments.items() %}{{ k }}={{ v if v is string else v | tojson }};{% endfor %}{{ c.function.arguments.keys() | list }}{{ c.function.arguments | items | list | length }}{% endfor %}", CALLS, {}),
    ("reasoning", "{% for m in messages %}{% if m.reasoning_content is string %}<think>\n{{ m.reasoning_content.strip('\\n') }}\n</think>\n\n{% endif %}{{ m.content if m.content else '' }}{% endfor %}", CALLS, {}),
    ("thinking split off", "{% set c = '<think>\nhm\n</think>\n\nYes.' %}{% if '</think>' in c %}{{ c.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') }}|{{ c.split('</think>')[-1].lstrip('\n') }}{% endif %}", TALK, {}),
    ("parts of a content", "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{% if p.type == 'image' %}<image>{% elif p['type'] == 'text' %}{{ p['text'] | trim }}{% endif %}{% endfor %}{% endif %}{% endfor %}", PARTS, {}),
    ("kinds of values", "{% for v in ['a', [1], {'b': 1}, 1, 1.5, true, none] %}{{ v is string }}{{ v is iterable }}{{ v is sequence }}{{ v is mapping }}{{ v is number }}{{ v is integer }}{{ v is boolean }}{{ v is none }};{% endfor %}", TALK, {}),
    ("per cent", "{{ '<|%s|>%d' % (messages[0].role, 3) }}{{ '%s!' % messages[0].content }}{{ '%05.2f|%x|%-4s|%%' % (3.14159, 255, 'a') }}{{ '%s' % none }}{{ 7 % 3 }}{{ -7 % 3 }}{{ 2 * 7 % 4 }}", TALK, {}),
    ("per cent with names", "{{ '%(role)s says %(content)s' % messages[0] }}{{ '%s and %s' | format('a', 2) }}{{ '{} {x}'.format(1, x='y') }}", TALK, {}),
    ("methods of texts", "{% set t = ' Ab cd-ef ' %}{{ t.strip() }}|{{ t.lstrip() }}|{{ t.rstrip() }}|{{ t.upper() }}|{{ t.lower() }}|{{ t.title() }}|{{ t.strip().capitalize() }}|{{ t.replace('b', 'X') }}|{{ t.split() }}|{{ t.split('-') }}|{{ t.split(' ', 1) }}|{{ t.startswith(' A') }}{{ t.endswith(('x', ' ')) }}|{{ t.find('c') }}{{ t.find('z') }}|{{ t.count(' ') }}|{{ '-'.join(['a', 'b']) }}|{{ 'a\nb'.splitlines() }}", TALK, {}),
    ("more methods of texts", "{{ 'abc'.removeprefix('a') }}{{ 'abc'.removesuffix('c') }}|{{ 'a=b=c'.partition('=') | join(' ') }}|{{ 'a=b=c'.rpartition('=')[0] }}|{{ 'a,b,c'.rsplit(',', 1) }}|{{ ' a  b '.rsplit() }}|{{ 'abc'.index('c') }}|{{ '7'.zfill(3) }}{{ '-7'.zfill(4) }}|{{ 'ab'.ljust(4, '.') }}{{ 'ab'.rjust(4) }}{{ 'ab'.center(5, '*') }}|{{ 'aB'.swapcase() }}{{ 'ẞA'.casefold() }}|{{ '12'.isdigit() }}{{ 'a1'.isalnum() }}{{ 'ab'.isalpha() }}{{ ' '.isspace() }}{{ 'AB'.isupper() }}", TALK, {}),
    ("characters stripped", "{{ '##a#'.strip('#') }}{{ 'xyax'.lstrip('xy') }}{{ 'a\n\n'.rstrip('\n') }}{{ '\u200ba\u00a0'.strip() }}|{{ ' a ' | trim }}{{ 'xax' | trim('x') }}", TALK, {}),
    ("filters over messages", "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | map('trim') | join('+') }}{{ messages | rejectattr('role', 'eq', 'user') | list | length }}{{ (messages | last).role }}{{ (messages | first)['role'] }}{{ messages | map(attribute='role') | unique | join(',') }}", TALK, {}),
    ("defaults", "{{ nothing | default('d') }}{{ '' | default('e', true) }}{{ none | default('f') }}{{ nothing or 'g' }}{{ messages[0].nothing | d('h') }}{{ nothing | length }}{% for x in nothing %}x{% endfor %}{{ nothing ~ 'i' }}", TALK, {}),
    ("special tokens", "{{ bos_token }}{{ eos_token }}{{ unk_token }}[{{ pad_token }}]{{ pad_token is defined }}{{ sep_token is not defined }}", TALK, {}),
    ("today", "{{ strftime_now('%d %b %Y') }}|{{ strftime_now('%Y-%m-%d') }}|{{ strftime_now('%A, %B %-d') }}|{{ strftime_now('%H:%M:%S %j %y %I%p') }}{% if strftime_now is defined %}y{% endif %}", TALK, {}),
    ("dictionaries", "{% set d = dict(a=1, b='x') %}{{ d.a }}{{ d['b'] }}{{ d.get('c', 'none') }}{{ 'a' in d }}{% for k in d %}{{ k }}{% endfor %}{% for k, v in d | dictsort %}{{ k }}{{ v }}{% endfor %}{{ d | length }}{{ d.values() | list }}", TALK, {}),
    ("loops told apart", "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ 'F' if loop.first }}{{ 'L' if loop.last }}{{ loop.revindex0 }}{% if loop.previtem is defined and loop.previtem.role == m.role %}same{% endif %}{% if not loop.last and loop.nextitem.role == 'assistant' %}>{% endif %} {% else %}none{% endfor %}", TALK, {}),
    ("loops with a condition", "{% for m in messages if m.role != 'system' %}{{ loop.index0 }}{{ m.role }}{% endfor %}{% for i in range(3) %}{{ i }}{% endfor %}{% for i in range(4, 0, -2) %}{{ i }}{% endfor %}", TALK, {}),
    ("generation", "{% for m in messages %}{% if m.role == 'assistant' %}<|a|>{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}\n{% else %}<|u|>{{ m.content }}\n{% endif %}{% endfor %}", TALK, {"generation": True}),
    ("generation with white space", "{%- for m in messages %}\n  {%- if m.role == 'assistant' %}\n    {%- generation -%}\n      {{ m.content | trim }}{{ '!' if loop.last }}\n    {%- endgeneration -%}\n  {%- else %}\n    {{- m.content }}\n  {%- endif %}\n{%- endfor %}\n", TALK, {"generation": True}),
    ("raw and comments", "{# {{ 1 % 0 }} #}{% raw %}{{ messages }}{% generation %}{% endraw %}{{ '{{' }}{{ \"}}\" }}{{ {'a': {'b': 2}}['a']['b'] }}", TALK, {}),
    ("indent and replace", "{{ 'a\nb\n\nc' | indent(2) }}|{{ 'a\nb' | indent(1, true) }}|{{ 'aba' | replace('a', 'x') }}|{{ 'ab c' | title }}|{{ 'ab' | capitalize }}|{{ [3, 1, 2] | sort | join }}|{{ [1, 2] | sum }}|{{ '12' | int + 1 }}|{{ 2.567 | round(1) }}|{{ -3 | abs }}|{{ 'abc' | reverse }}|{{ 5 | string + 'x' }}|{{ [1, 5] | max }}", TALK, {}),
    ("arguments that may be text", "{% for c in messages[1].tool_calls %}{% if c.function is defined %}{% set c = c.function %}{% endif %}{{ c.name }}{{ c.arguments if c.arguments is string else c.arguments | tojson }}{% endfor %}{{ messages[1].tool_calls[0].function.arguments }}", CALLS, {}),
    ("comparisons", "{{ 1 < 2 <= 2 }}{{ 'a' not in 'bc' }}{{ not false and (1 or 0) }}{{ 2 in [1, 2] }}{{ messages[0] == messages[0] }}{{ 'x' if none else 'y' }}{{ (1, 2)[1] }}{{ 5 is divisibleby 5 }}{{ 3 is odd }}{{ 'a' is in ['a'] }}", TALK, {}),
    ("tools listed by name", "{% set names = [] %}{% for t in tools %}{% set names = names + [t.function.name] %}{{ names | join(', ') }}: {{ t.function.description }}({% for n, p in t.function.parameters.properties.items() %}{{ n }}: {{ p.type }}{% if p.default is defined %}={{ p.default }}{% endif %}{{ ', ' if not loop.last }}{% endfor %}){% endfor %}", TALK, {"tools": TOOLS}),
    ("a variable of the caller", "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>{% endif %}{{ kind }}", TALK, {"values": {"enable_thinking": False, "kind": "short"}}),
    ("attributes that are not there", "{{ messages[0].nothing.more }}", TALK, {}),
    ("a text and nothing", "{{ 'a' + messages[0].nothing }}", TALK, {}),
]


def main():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>")), **SPECIAL)
    out = []
    for name, template, messages, more in CASES:
        case = {"name": name, "template": template, "messages": messages}
        case |= {key: more[key] for key in ("tools", "values", "open") if key in more}
        arguments = dict(
            tools=more.get("tools"), chat_template=template, add_generation_prompt=more.get("open", False), **more.get("values", {})
        )
        try:
            case["text"] = tokenizer.apply_chat_template(messages, tokenize=False, **arguments)
        except Exception as error:
            case["refused"] = str(error)
        if more.get("generation"):
            _, [spans] = chat_template_utils.render_jinja_template(
                conversations=[messages], return_assistant_tokens_mask=True, **tokenizer.special_tokens_map, **arguments
            )
            case["generated"] = [case["text"][start:end] for start, end in spans]
        out.append(case)
    print(json.dumps({"special": SPECIAL, "cases": out}, ensure_ascii=False, indent=1))


main()
