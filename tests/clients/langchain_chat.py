"""Conversations through langchain-openai. Usage: langchain_chat.py BASE_URL"""

import sys
from typing import Literal

import openai
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings


def chat(**options):
    options = dict(model="demo", temperature=0, max_retries=0, timeout=60, stream_usage=True) | options
    return ChatOpenAI(base_url=sys.argv[1] + "/v1", api_key="none", **options)


@tool
def get_price(item: Literal["tomatoes", "apples"]) -> str:
    """Get the price of an item"""
    return '{"price": 14}'


def conversation():
    messages = [SystemMessage("You are a helpful assistant."), HumanMessage("What is a KV cache?")]
    first = chat().invoke(messages)
    assert "cache" in first.content and first.usage_metadata["output_tokens"] > 1, first
    assert chat().invoke(messages + [AIMessage(first.content), HumanMessage("What is 25 + 7?")]).content
    # The same over the Responses API.
    assert chat(use_responses_api=True).invoke(messages).text == first.content
    return messages, first.content


def streaming(messages, whole):
    chunks = list(chat().stream(messages))
    assert "".join(chunk.content for chunk in chunks) == whole, chunks
    assert sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata) > 1, chunks


def tools():
    messages = [HumanMessage("Check the price of tomatoes.")]
    answer = chat().bind_tools([get_price], tool_choice="required", parallel_tool_calls=False).invoke(messages)
    call = answer.tool_calls[0]
    assert call["name"] == "get_price" and "item" in call["args"], answer
    result = ToolMessage(get_price.invoke(call["args"]), tool_call_id=call["id"])
    after = chat().bind_tools([get_price]).invoke(messages + [answer, result])
    assert after.content or after.tool_calls, after


def embeddings():
    # Sends token ids of a foreign tokenizer unless told not to.
    embedder = OpenAIEmbeddings(model="demo", base_url=sys.argv[1] + "/v1", api_key="none", check_embedding_ctx_length=False)
    one, two = embedder.embed_documents(["What is a KV cache?", "Tell me a story about a fox."])
    assert len(one) == len(two) == 256 and embedder.embed_query("What is a KV cache?") == one != two, (one, two)


def errors():
    for options, kind in ((dict(model="no-such-model"), openai.NotFoundError), (dict(temperature=-3), openai.BadRequestError)):
        try:
            chat(**options).invoke("hi")
        except kind:
            pass
        else:
            raise AssertionError(f"{options} must fail")


streaming(*conversation())
tools()
embeddings()
errors()
print("ok")
