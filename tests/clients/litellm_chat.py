"""Conversations through litellm. Usage: litellm_chat.py BASE_URL"""

import json
import os
import sys

# The table of prices comes with the package; nothing is fetched.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm

litellm.telemetry = False
base = sys.argv[1] + "/v1"
PRICE = {
    "type": "function",
    "function": {
        "name": "get_price",
        "description": "Get the price of an item",
        "parameters": {"type": "object", "properties": {"item": {"type": "string", "enum": ["tomatoes", "apples"]}}, "required": ["item"]},
    },
}


def ask(messages, model="demo", **options):
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    options = dict(temperature=0, max_retries=0, timeout=60) | options
    return litellm.completion(model=f"openai/{model}", api_base=base, api_key="none", messages=messages, **options)


def conversation():
    messages = [{"role": "user", "content": "What is a KV cache?"}]
    first = ask(messages).choices[0].message.content
    assert "cache" in first, first
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "What is 25 + 7?"}]
    assert ask(messages).choices[0].message.content
    return first


def streaming(whole):
    chunks = list(ask("What is a KV cache?", stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole, (text, whole)
    rebuilt = litellm.stream_chunk_builder(chunks)
    assert rebuilt.choices[0].message.content == whole and rebuilt.usage.completion_tokens > 1, rebuilt


def tools():
    answer = ask("Check the price of tomatoes.", tools=[PRICE], tool_choice="required", parallel_tool_calls=False)
    call = answer.choices[0].message.tool_calls[0]
    assert call.function.name == "get_price" and "item" in json.loads(call.function.arguments), answer
    messages = [
        {"role": "user", "content": "Check the price of tomatoes."},
        answer.choices[0].message.model_dump(),
        {"role": "tool", "tool_call_id": call.id, "content": '{"price": 14}'},
    ]
    after = ask(messages, tools=[PRICE]).choices[0].message
    assert after.content or after.tool_calls, after


def embeddings():
    answer = litellm.embedding(
        model="openai/demo", input=["What is a KV cache?", "A fox."], api_base=sys.argv[1] + "/v1", api_key="none", encoding_format="float"
    )
    assert [len(item["embedding"]) for item in answer.data] == [256, 256] and answer.usage.prompt_tokens > 0, answer


def errors():
    for options, kind in (
        (dict(model="no-such-model"), litellm.NotFoundError),
        (dict(temperature=-3), litellm.BadRequestError),
    ):
        try:
            ask("hi", **options)
        except kind:
            pass
        else:
            raise AssertionError(f"{options} must fail")


streaming(conversation())
tools()
embeddings()
errors()
print("ok")
