"""Conversations with the official anthropic client. Usage: anthropic_messages.py BASE_URL"""

import sys

import anthropic

client = anthropic.Anthropic(base_url=sys.argv[1], api_key="none", max_retries=0, timeout=60)
PRICE = {
    "name": "get_price",
    "description": "Get the price of an item",
    "input_schema": {"type": "object", "properties": {"item": {"type": "string", "enum": ["tomatoes", "apples"]}}, "required": ["item"]},
}


def ask(messages, **options):
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    # The client knows the temperature by now only as a field of one's own.
    return client.messages.create(**request(messages, **options))


def request(messages, **options):
    return dict(model="", max_tokens=80, messages=messages, extra_body={"temperature": 0}) | options


def conversation():
    messages = [{"role": "user", "content": "What is a KV cache?"}]
    first = ask(messages, system="You are a helpful assistant.")
    assert first.stop_reason == "end_turn" and "cache" in first.content[0].text, first
    messages += [{"role": "assistant", "content": first.content}, {"role": "user", "content": "What is 25 + 7?"}]
    assert ask(messages, system="You are a helpful assistant.").content[0].text
    counted = client.messages.count_tokens(model="", messages=messages[:1], system="You are a helpful assistant.")
    assert counted.input_tokens == first.usage.input_tokens + first.usage.cache_read_input_tokens, (counted, first)
    return first.content[0].text


def streaming(whole):
    messages = [{"role": "user", "content": "What is a KV cache?"}]
    with client.messages.stream(**request(messages, system="You are a helpful assistant.")) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == whole == final.content[0].text, (text, whole)
    assert final.usage.output_tokens > 1 and final.stop_reason == "end_turn", final


def limits():
    assert ask("Tell me a story.", max_tokens=2).stop_reason == "max_tokens"
    answer = ask("What is a KV cache?", stop_sequences=["cache"])
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", "cache"), answer


def tools():
    messages = [{"role": "user", "content": "Check the price of tomatoes."}]
    answer = ask(messages, tools=[PRICE], tool_choice={"type": "any", "disable_parallel_tool_use": True})
    call = next(block for block in answer.content if block.type == "tool_use")
    assert answer.stop_reason == "tool_use" and call.name == "get_price" and "item" in call.input, answer
    result = {"type": "tool_result", "tool_use_id": call.id, "content": '{"price": 14}'}
    messages += [{"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
    assert ask(messages, tools=[PRICE]).content
    named = {"type": "tool", "name": "get_price"}
    with client.messages.stream(**request(messages[:1], tools=[PRICE], tool_choice=named)) as stream:
        final = stream.get_final_message()
    call = next(block for block in final.content if block.type == "tool_use")
    assert final.stop_reason == "tool_use" and "item" in call.input, final


def errors():
    for options, kind in (
        (dict(model="no-such-model"), anthropic.NotFoundError),
        (dict(max_tokens=0), anthropic.BadRequestError),
        (dict(extra_body={"temperature": -3}), anthropic.BadRequestError),
    ):
        try:
            ask("hi", **options)
        except kind as error:
            assert error.body["error"]["message"], error
        else:
            raise AssertionError(f"{options} must fail")


streaming(conversation())
limits()
tools()
errors()
print("ok")
