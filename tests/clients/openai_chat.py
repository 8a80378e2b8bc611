"""Conversations with the official openai client. Usage: openai_chat.py BASE_URL"""

import asyncio
import json
import sys

import openai

base = sys.argv[1] + "/v1"
client = openai.OpenAI(base_url=base, api_key="none", max_retries=0, timeout=30)
model = client.models.list().data[0].id


def ask(content, **options):
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": content}], **options)


def question():
    answer = ask("What is a KV cache?", temperature=0)
    assert "cache" in answer.choices[0].message.content, answer
    assert answer.choices[0].finish_reason == "stop", answer
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens, answer
    return answer.choices[0].message.content


def streaming(whole):
    stream = ask("What is a KV cache?", temperature=0, stream=True, stream_options={"include_usage": True})
    text, reasons, usage = "", [], None
    for chunk in stream:
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
        usage = chunk.usage or usage
    assert text == whole, (text, whole)
    assert reasons == ["stop"] and usage.completion_tokens > 1, (reasons, usage)


def several_turns():
    messages = [{"role": "system", "content": "You are a helpful assistant."}]
    for content in ("What is 25 + 7?", "And plus 3?"):
        messages.append({"role": "user", "content": content})
        answer = client.chat.completions.create(model=model, messages=messages, temperature=0)
        messages.append({"role": "assistant", "content": answer.choices[0].message.content})
    assert all(message["content"] for message in messages), messages


def json_answer():
    text = ask(
        "Extract name, age, city and job as JSON: At 24, Nora still works as a musician in Perth.", temperature=0
    ).choices[0].message.content
    assert json.loads(text)["name"] == "Nora", text


def sampling():
    options = dict(temperature=1.0, top_p=0.9, seed=11, max_tokens=40, n=2)
    one, two = (ask("Tell me a story about a fox.", **options) for _ in range(2))
    texts = [[choice.message.content for choice in answer.choices] for answer in (one, two)]
    assert texts[0] == texts[1], "a seed fixes the answer"
    assert len(texts[0]) == 2 and texts[0][0] != texts[0][1], texts


def limits():
    answer = ask("Tell me a story.", max_tokens=5)
    assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 5, answer
    answer = ask("What is a KV cache?", temperature=0, stop=["cache"])
    assert "cache" not in answer.choices[0].message.content and answer.choices[0].finish_reason == "stop", answer


def logprobs():
    answer = ask("What is a KV cache?", temperature=0, logprobs=True, top_logprobs=2, max_tokens=4)
    content = answer.choices[0].logprobs.content
    assert len(content) == 4 and all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in content), content


def completions():
    answer = client.completions.create(model=model, prompt="A KV cache", max_tokens=8, temperature=0, echo=True)
    assert answer.choices[0].text.startswith("A KV cache"), answer


def embeddings():
    texts = ["What is a KV cache?", "Tell me a story about a fox.", "What is a KV cache?"]
    answer = client.embeddings.create(model=model, input=texts)  # base64 on the wire: the client decodes it
    vectors = [item.embedding for item in answer.data]
    assert [item.index for item in answer.data] == [0, 1, 2] and len(vectors[0]) == 256, answer
    assert vectors[0] == vectors[2] != vectors[1], "what is computed beside it does not change a vector"
    assert all(abs(sum(number * number for number in vector) - 1) < 1e-5 for vector in vectors)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 0, answer.usage
    plain = client.embeddings.create(model=model, input=texts[1], encoding_format="float").data[0].embedding
    assert all(abs(a - b) < 1e-7 for a, b in zip(plain, vectors[1])), (plain, vectors[1])
    try:
        client.embeddings.create(model=model, input=texts, dimensions=64)
    except openai.BadRequestError as error:
        assert "dimensions" in error.body["message"], error
    else:
        raise AssertionError("a model that was not trained for it cannot shorten its vectors")


def errors():
    for options, kind in (
        (dict(model="no-such-model"), openai.NotFoundError),
        (dict(model=model, temperature=-3), openai.BadRequestError),
        (dict(model=model, max_tokens=0), openai.BadRequestError),
    ):
        try:
            client.chat.completions.create(messages=[{"role": "user", "content": "hi"}], **options)
        except kind as error:
            assert error.body["message"], error
        else:
            raise AssertionError(f"{options} must fail")


async def together():
    peer = openai.AsyncOpenAI(base_url=base, api_key="none", max_retries=0, timeout=30)
    ask_one = lambda word: peer.chat.completions.create(
        model=model, messages=[{"role": "user", "content": f"Tell me a story about a {word}."}], temperature=0, max_tokens=30
    )
    answers = await asyncio.gather(*(ask_one(word) for word in ("fox", "cat", "dog", "bear") * 4))
    texts = [answer.choices[0].message.content for answer in answers]
    assert texts[:4] * 4 == texts, "what runs beside it does not change an answer"


whole = question()
streaming(whole)
several_turns()
json_answer()
sampling()
limits()
logprobs()
completions()
embeddings()
errors()
asyncio.run(together())
print("ok")
