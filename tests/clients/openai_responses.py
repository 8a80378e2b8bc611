"""The Responses API with the official openai client. Usage: openai_responses.py BASE_URL"""

import json
import sys

import openai

client = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="none", max_retries=0, timeout=60)
model = client.models.list().data[0].id
PRICE = {
    "type": "function",
    "name": "get_price",
    "description": "Get the price of an item",
    "parameters": {"type": "object", "properties": {"item": {"type": "string", "enum": ["tomatoes", "apples"]}}, "required": ["item"]},
    "strict": True,
}


def ask(content, **options):
    return client.responses.create(model=model, input=content, temperature=0, **options)


def conversation():
    first = ask("What is a KV cache?")
    assert first.status == "completed" and "cache" in first.output_text, first
    second = ask("Tell me more.", previous_response_id=first.id)
    assert second.previous_response_id == first.id and second.output_text, second
    assert client.responses.retrieve(first.id).output_text == first.output_text
    client.responses.delete(first.id)
    try:
        client.responses.retrieve(first.id)
    except openai.NotFoundError:
        return first.output_text
    raise AssertionError("a deleted response is gone")


def streaming(whole):
    events = list(ask("What is a KV cache?", stream=True))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole, (text, whole)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].type == "response.completed" and events[-1].response.usage.output_tokens > 1, events[-1]
    with client.responses.stream(model=model, input="What is a KV cache?", temperature=0) as stream:
        assert stream.get_final_response().output_text == whole


def tools():
    forced = ask("Check the price of tomatoes.", tools=[PRICE], tool_choice="required", parallel_tool_calls=False)
    call = next(item for item in forced.output if item.type == "function_call")
    assert call.name == "get_price" and "item" in json.loads(call.arguments), call
    result = {"type": "function_call_output", "call_id": call.call_id, "output": '{"price": 14}'}
    after = ask([result], previous_response_id=forced.id, tools=[PRICE])
    assert after.output and after.previous_response_id == forced.id, after
    events = list(ask("Check the price of tomatoes.", tools=[PRICE], tool_choice={"type": "function", "name": "get_price"}, stream=True))
    pieces = "".join(event.delta for event in events if event.type == "response.function_call_arguments.delta")
    done = next(event for event in events if event.type == "response.function_call_arguments.done")
    assert pieces == done.arguments and "item" in json.loads(pieces), pieces


def background():
    begun = ask("Tell me a story about a fox.", background=True, extra_body={"ignore_eos": True})
    assert client.responses.cancel(begun.id).status == "cancelled"


def errors():
    for options, kind in (
        (dict(model="no-such-model", input="hi"), openai.NotFoundError),
        (dict(model=model, input="hi", temperature=-3), openai.BadRequestError),
        (dict(model=model, input="hi", previous_response_id="resp_none"), openai.BadRequestError),
    ):
        try:
            client.responses.create(**options)
        except kind as error:
            assert error.body["message"], error
        else:
            raise AssertionError(f"{options} must fail")


streaming(conversation())
tools()
background()
errors()
print("ok")
