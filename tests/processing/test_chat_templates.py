import pytest

from mask_llava_hf.processing.chat_templates import PLAIN, VICUNA_SYSTEM_PROMPT, VICUNA_V1, plain, vicuna_v1
from mask_llava_hf.testing import tiny_tokenizer


def block(text):
    return {"type": "text", "text": text}


IMAGE = {"type": "image"}
CHAT = [
    {"role": "user", "content": [IMAGE, block("What is it?")]},
    {"role": "assistant", "content": [block("A cup.")]},
    {"role": "user", "content": "Sure?"},
]


def write(template, chat, **kwargs):
    return tiny_tokenizer().apply_chat_template(chat, chat_template=template, tokenize=False, **kwargs)


def test_vicuna_as_llava_writes_it():
    expected = f"{VICUNA_SYSTEM_PROMPT} USER: <image>\nWhat is it? ASSISTANT: A cup.</s>USER: Sure? ASSISTANT:"
    assert write(VICUNA_V1, CHAT, add_generation_prompt=True) == expected
    closed = write(VICUNA_V1, CHAT[:2])
    assert closed == f"{VICUNA_SYSTEM_PROMPT} USER: <image>\nWhat is it? ASSISTANT: A cup.</s>"


def test_system_prompts():
    own = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert write(VICUNA_V1, own) == "Be brief. USER: Hi "
    assert write(vicuna_v1(system_prompt=None), own[1:]) == "USER: Hi "
    assert write(vicuna_v1(system_prompt='It\'s "quoted"'), own[1:]) == 'It\'s "quoted" USER: Hi '


def test_images_come_first_each_on_its_line():
    chat = [{"role": "user", "content": [block("How many?"), IMAGE, IMAGE]}]
    assert write(vicuna_v1(None), chat) == "USER: <image>\n<image>\nHow many? "
    marked = vicuna_v1(None, image="<im_start><image><im_end>")
    assert write(marked, chat[:1]).startswith("USER: <im_start><image><im_end>\n<im_start>")


def test_plain_as_llava_pretrains():
    chat = [{"role": "user", "content": [IMAGE]}, {"role": "assistant", "content": [block("a red square")]}]
    assert write(PLAIN, chat) == "<image>a red square\n"
    assert write(plain("[<image>]"), chat[:1], add_generation_prompt=True) == "[<image>]"


@pytest.mark.parametrize(("template", "answer"), [(VICUNA_V1, " A cup.</s>"), (PLAIN, "A cup.\n")])
def test_what_is_to_be_learned_is_marked(template, answer):
    tokenizer = tiny_tokenizer()
    encoded = tokenizer.apply_chat_template(
        CHAT, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    marked = [token for token, own in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if own]
    assert tokenizer.decode(marked) == answer
