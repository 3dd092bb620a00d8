"""Makes the golden texts that `common/src/supervised/tests/golden.rs` compares chat templates with.

    pip install transformers jinja2
    python common/golden/chat_templates.py

`chat_templates.json` holds what `transformers` renders of some conversations with each template in `chat/`, and with
our own default, with and without a prompt for the next turn; or `null` where the template raises an exception. The
templates are written for these tests, in the formats that models of the same name use.
"""

import json
from pathlib import Path

from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

HERE = Path(__file__).parent
DEFAULT = HERE.parent / "src" / "supervised" / "default.jinja"

SPECIALS = {
    "default": {"eos_token": "<|endoftext|>"},
    "default_with_bos": {"bos_token": "<s>", "eos_token": "</s>"},
    "chatml": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "mistral": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "smollm2": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
    "methods": {},
}


def turns(*said):
    return [{"role": role, "content": content} for role, content in said]


CONVERSATIONS = [
    turns(("user", "Hello!"), ("assistant", "Hi, how can I help?")),
    turns(("system", "Speak like a pirate."), ("user", "Who are you?"), ("assistant", "Arr.")),
    turns(
        ("user", "What is 2 + 2?"), ("assistant", "4"), ("user", "And 3 + 3?"), ("assistant", "6"),
        ("user", "Thanks."),
    ),
    turns(
        ("system", "  Blank around.  \n"), ("user", "  two\n\nparagraphs \n"), ("assistant", "\n a\n\n\tb \n"),
        ("user", "ünïcödé 漢字 😀 \"quoted\" 'single' \\n"), ("assistant", "{{ braces }} {% raw %} <b>&amp;</b>"),
    ),
    turns(
        ("user", "Weather?"), ("assistant", "I ask."), ("tool", "{\"sun\": 1}"), ("tool", "22 degrees"),
        ("assistant", "<think>\nwarm\n</think>\n\nSunny."),
    ),
    turns(("user", "One."), ("user", "Two."), ("assistant", "Three.")),
    turns(("assistant", "I begin."), ("user", "You do.")),
]


def rendered(template, messages, prompt, specials):
    try:
        texts, _ = render_jinja_template(
            conversations=[messages], chat_template=template, add_generation_prompt=prompt, **specials
        )
        return texts[0]
    except TemplateError as error:
        print(f"  refused: {error}")
        return None


def main():
    golden = []
    for name, specials in SPECIALS.items():
        path = DEFAULT if name.startswith("default") else HERE / "chat" / f"{name}.jinja"
        template = path.read_text(encoding="utf-8")
        print(name)
        cases = []
        for messages in CONVERSATIONS:
            whole, prompt = (rendered(template, messages, prompt, specials) for prompt in (False, True))
            cases.append({"messages": messages, "whole": whole, "prompt": prompt})
        golden.append({"name": name, "template": template, "specials": specials, "cases": cases})
    target = HERE / "chat_templates.json"
    target.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
