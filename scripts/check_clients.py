"""Serve a tiny model that was trained here to call a tool and to write JSON, and ask it with the clients people use.

    python scripts/check_clients.py [--venvs FOLDER] [CLIENT ...]

Each client lives in an environment of its own in FOLDER, made with pip on the first run. Prints a table of what worked;
the exit status is the number of clients with a failure.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import textwrap
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import mlx_adapters  # noqa: E402, F401  (before mlx: it sees to a fast BLAS)

# isort: split
import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import mlx.optimizers as optim  # noqa: E402
from helpers.chat_families import write_base  # noqa: E402
from helpers.serving import running  # noqa: E402

from mlx_adapters.generation.live import load_model  # noqa: E402

QUESTION, ANSWER, RESULT = "What is the weather in Paris?", "It is sunny in Paris.", "sunny"
WHO, ADA = "Who is Ada?", {"name": "Ada", "age": 36}
CALL = {"type": "function", "id": "c0", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
START = """
import json, os, sys
from pydantic import BaseModel
URL = sys.argv[1]
class Person(BaseModel):
    name: str
    age: int
def get_weather(city: str) -> str:
    "The weather in a city."
    assert city == "Paris", city
    return "sunny"
QUESTION, WHO, ANSWER = "What is the weather in Paris?", "Who is Ada?", "It is sunny in Paris."
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "The weather in a city.", "parameters":
        {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}
def check(name, work):
    try:
        work()
        print("ok", name)
    except Exception as error:
        print("failed", name, "-", type(error).__name__, str(error)[:300].replace("\\n", " "))
def same(given, wanted):
    assert given == wanted, f"{given!r}, not {wanted!r}"
def ada(person):
    same(person.model_dump(), {"name": "Ada", "age": 36})
"""
CLIENTS: dict[str, tuple[str, str]] = {
    "openai": (
        "openai",
        """
import openai
client = openai.OpenAI(base_url=URL, api_key="none", max_retries=0)
talk = [{"role": "user", "content": QUESTION}]
def tools():
    messages = list(talk)
    call = client.chat.completions.create(model="base", messages=messages, tools=[TOOL], temperature=0).choices[0]
    same(call.finish_reason, "tool_calls")
    (one,) = call.message.tool_calls
    result = get_weather(**json.loads(one.function.arguments))
    messages += [call.message, {"role": "tool", "tool_call_id": one.id, "content": result}]
    said = client.chat.completions.create(model="base", messages=messages, tools=[TOOL], temperature=0)
    same(said.choices[0].message.content, ANSWER)
def streamed():
    text = ""
    for chunk in client.chat.completions.create(model="base", messages=talk, tools=[TOOL], temperature=0, stream=True):
        for call in chunk.choices[0].delta.tool_calls or []:
            text += call.function.arguments or ""
    same(json.loads(text), {"city": "Paris"})
def parsed():
    ada(client.chat.completions.parse(model="base", messages=[{"role": "user", "content": WHO}], temperature=0,
        response_format=Person).choices[0].message.parsed)
def responses():
    ada(client.responses.parse(model="base", input=WHO, temperature=0, text_format=Person).output_parsed)
def embeddings():
    same(len(client.embeddings.create(model="base", input=["a", "b"]).data), 2)
for work in (tools, streamed, parsed, responses, embeddings):
    check(work.__name__, work)
""",
    ),
    "pydantic-ai": (
        "pydantic-ai-slim[openai]",
        """
from pydantic_ai import Agent, NativeOutput, PromptedOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
model = OpenAIChatModel("base", provider=OpenAIProvider(base_url=URL, api_key="none"))
cold = {"temperature": 0}
def tools():
    same(Agent(model, tools=[get_weather], model_settings=cold).run_sync(QUESTION).output, ANSWER)
def tool_output():
    ada(Agent(model, output_type=Person, model_settings=cold).run_sync(WHO).output)
def native_output():
    ada(Agent(model, output_type=NativeOutput(Person), model_settings=cold).run_sync(WHO).output)
for work in (tools, tool_output, native_output):
    check(work.__name__, work)
""",
    ),
    "instructor": (
        "instructor",
        """
import instructor, openai
def of(mode):
    client = instructor.from_openai(openai.OpenAI(base_url=URL, api_key="none"), mode=mode)
    ada(client.chat.completions.create(model="base", response_model=Person, temperature=0, max_retries=1,
        messages=[{"role": "user", "content": WHO}]))
for name in ("TOOLS", "JSON", "JSON_SCHEMA"):
    check(name.lower(), lambda: of(getattr(instructor.Mode, name)))
""",
    ),
    "langchain-openai": (
        "langchain-openai",
        """
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
model = ChatOpenAI(model="base", base_url=URL, api_key="none", temperature=0)
def tools():
    bound, messages = model.bind_tools([get_weather]), [HumanMessage(QUESTION)]
    messages.append(bound.invoke(messages))
    (call,) = messages[-1].tool_calls
    messages.append(ToolMessage(get_weather(**call["args"]), tool_call_id=call["id"]))
    same(bound.invoke(messages).content, ANSWER)
def of(method):
    ada(model.with_structured_output(Person, method=method).invoke(WHO))
def streamed():
    same("".join(chunk.content for chunk in model.stream(WHO, response_format={"type": "json_object"}))[:1], "{")
check("tools", tools)
for method in ("function_calling", "json_schema", "json_mode"):
    check(method, lambda: of(method))
check("streamed", streamed)
""",
    ),
    "litellm": (
        "litellm",
        """
import litellm
cold = {"model": "openai/base", "api_base": URL, "api_key": "none", "temperature": 0}
def tools():
    talk = [{"role": "user", "content": QUESTION}]
    answer = litellm.completion(messages=talk, tools=[TOOL], tool_choice="auto", **cold).choices[0].message
    same(json.loads(answer.tool_calls[0].function.arguments), {"city": "Paris"})
def schema():
    answer = litellm.completion(messages=[{"role": "user", "content": WHO}], response_format=Person, **cold)
    ada(Person.model_validate_json(answer.choices[0].message.content))
for work in (tools, schema):
    check(work.__name__, work)
""",
    ),
    "llm": (
        "llm",
        """
import pathlib, subprocess, tempfile
home = tempfile.mkdtemp()
pathlib.Path(home, "extra-openai-models.yaml").write_text(
    f"- model_id: tiny\\n  model_name: base\\n  api_base: {URL}\\n  supports_tools: true\\n  supports_schema: true\\n")
def llm(*words):
    told = os.environ | {"LLM_USER_PATH": home, "OPENAI_API_KEY": "none"}
    command = [str(pathlib.Path(sys.executable).parent / "llm"), "-m", "tiny", "-o", "temperature", "0", *words]
    done = subprocess.run(command, env=told, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-300:]
    return done.stdout.strip()
def schema():
    ada(Person.model_validate_json(llm(WHO, "--schema", "name, age int")))
def tools():
    code = 'def get_weather(city: str) -> str:\\n    "The weather in a city."\\n    return "sunny"'
    assert llm(QUESTION, "--functions", code).endswith(ANSWER)
for work in (schema, tools):
    check(work.__name__, work)
""",
    ),
    "openai-agents": (
        "openai-agents",
        """
import asyncio
from agents import (Agent, ModelSettings, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner, function_tool,
    set_tracing_disabled)
from openai import AsyncOpenAI
set_tracing_disabled(True)
def of(kind):
    def made(**more):
        client = AsyncOpenAI(base_url=URL, api_key="none", max_retries=0)
        return Agent(name="a", model=kind("base", client), model_settings=ModelSettings(temperature=0), **more)
    same(Runner.run_sync(made(tools=[function_tool(get_weather)]), QUESTION).final_output, ANSWER)
    ada(Runner.run_sync(made(output_type=Person), WHO).final_output)
    async def streamed():
        run = Runner.run_streamed(made(tools=[function_tool(get_weather)]), QUESTION)
        async for _ in run.stream_events():
            pass
        return run.final_output
    same(asyncio.run(streamed()), ANSWER)
for kind in (OpenAIChatCompletionsModel, OpenAIResponsesModel):
    check(kind.__name__, lambda: of(kind))
""",
    ),
    "ollama": (
        "ollama",
        """
import ollama
client, cold = ollama.Client(URL.removesuffix("/v1")), {"temperature": 0}
def tools():
    messages = [{"role": "user", "content": QUESTION}]
    messages.append(client.chat("base", messages, tools=[get_weather], options=cold).message)
    (call,) = messages[-1].tool_calls
    messages.append({"role": "tool", "tool_name": "get_weather", "content": get_weather(**call.function.arguments)})
    same(client.chat("base", messages, tools=[get_weather], options=cold).message.content, ANSWER)
def schema():
    asked = dict(messages=[{"role": "user", "content": WHO}], format=Person.model_json_schema(), options=cold)
    ada(Person.model_validate_json(client.chat("base", **asked).message.content))
    ada(Person.model_validate_json("".join(one.message.content for one in client.chat("base", stream=True, **asked))))
def nothing_said():
    assert client.chat("base", [{"role": "user", "content": ""}], options=cold | {"num_predict": 2}).done
for work in (tools, schema, nothing_said):
    check(work.__name__, work)
""",
    ),
    "guidance": (
        "guidance openai",
        """
import guidance
from guidance import assistant, gen, models, user
def of(what):
    model = models.OpenAI("base", base_url=URL, api_key="none", echo=False)
    with user():
        model += WHO
    with assistant():
        model += what
    ada(Person.model_validate_json(model["x"]))  # put together of the tokens whose log-probabilities are told
check("gen", lambda: of(gen("x", max_tokens=60, temperature=0)))
check("json", lambda: of(guidance.json("x", schema=Person, temperature=0)))
""",
    ),
}

# The same for node, where it is there.
NODE_CLIENTS: dict[str, tuple[str, str]] = {
    "openai-node": (
        "openai",
        """
import assert from "node:assert";
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.argv.at(-1), apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "What is the weather in Paris?" }];
const parameters = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const called = [];
const get_weather = ({ city }) => { called.push(city); return "sunny"; };
const described = { name: "get_weather", description: "The weather in a city.", parameters };
const tools = [{ type: "function", function: { ...described, function: get_weather, parse: JSON.parse } }];
const run = stream => client.chat.completions.runTools({ model: "base", messages, tools, temperature: 0, stream });
async function check(name, work) {
  try { await work(); console.log("ok", name); }
  catch (error) { console.log("failed", name, "-", String(error).slice(0, 300).replaceAll("\\n", " ")); }
}
for (const stream of [false, true])
  await check(stream ? "runTools, streamed" : "runTools", async () => {
    called.length = 0;
    assert.equal(await run(stream).finalContent(), "It is sunny in Paris.");
    assert.deepEqual(called, ["Paris"]);
  });
await check("schema", async () => {
  const schema = { type: "object", properties: { name: { type: "string" }, age: { type: "integer" } },
                   required: ["name", "age"], additionalProperties: false };
  const answer = await client.chat.completions.parse({ model: "base", temperature: 0,
    messages: [{ role: "user", content: "Who is Ada?" }],
    response_format: { type: "json_schema", json_schema: { name: "person", strict: true, schema } } });
  assert.deepEqual(JSON.parse(answer.choices[0].message.content), { name: "Ada", age: 36 });
});
""",
    ),
    "ai-sdk": (
        "ai @ai-sdk/openai @ai-sdk/openai-compatible zod",
        """
import assert from "node:assert";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";
const to = { baseURL: process.argv.at(-1), apiKey: "none" }, openai = createOpenAI(to);
const compatible = createOpenAICompatible({ ...to, name: "x", includeUsage: true, supportsStructuredOutputs: true });
const get_weather = tool({ description: "The weather in a city.", inputSchema: z.object({ city: z.string() }),
                           execute: async ({ city }) => city === "Paris" ? "sunny" : "wrong" });
const asked = { prompt: "What is the weather in Paris?", tools: { get_weather }, stopWhen: stepCountIs(3) };
const schema = z.object({ name: z.string(), age: z.number().int() });
const models = { compatible: compatible("base"), chat: openai.chat("base"), responses: openai.responses("base") };
for (const [name, model] of Object.entries(models)) {
  const cold = { model, temperature: 0, maxRetries: 0 };
  try {
    assert.equal((await generateText({ ...cold, ...asked })).text, "It is sunny in Paris.");
    assert.equal(await streamText({ ...cold, ...asked }).text, "It is sunny in Paris.");
    const made = await generateObject({ ...cold, schema, prompt: "Who is Ada?" });
    assert.deepEqual(made.object, { name: "Ada", age: 36 });
    console.log("ok", name);
  } catch (error) { console.log("failed", name, "-", String(error).slice(0, 300).replaceAll("\\n", " ")); }
}
""",
    ),
}


# What clients put around a question, in pieces: the model has to find the question in any of it.
PIECES = [
    '{"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}',
    '{"properties": {"name": {"title": "Name", "type": "string"}, "age": {"title": "Age", "type": "integer"}}}',
    '"additionalProperties": false, ',
    '"required": ["name", "age"], "title": "Person", "type": "object"',
    '"strict": true, ',
    '"description": "The weather in a city.", ',
    "Correctly extracted with all the required parameters with correct types",
    "understand the content and provide the parsed objects in json that match the following json_schema:\n\n",
    "Make sure to return an instance of the JSON, not the schema itself\n",
    "Always respond with a JSON object that is compatible with this schema:\n",
    "The final response which ends this conversation. ",
    "\n            ",
]


def around(rng: random.Random, most: int) -> str:
    """Up to `most` such pieces, or letters."""
    letters = "".join(rng.choice('abcdefghijklmnopqrstuvwxyz    {}[]":,_') for _ in range(rng.randint(0, 60)))
    return "".join(rng.choice([*PIECES, letters]) for _ in range(rng.randint(0, most)))


def shuffled(rng: random.Random, record: dict[str, Any]) -> dict[str, Any]:
    """The record with its keys in any order."""
    return {key: record[key] for key in rng.sample(list(record), len(record))}


def conversation(rng: random.Random) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """What the model is trained on: the last message, whatever tools and system text stand before."""

    def tool(name: str, properties: dict[str, Any]) -> dict[str, Any]:
        parameters = {"type": "object", "properties": properties, "required": list(properties)}
        parameters |= rng.choice([{}, {"additionalProperties": False}, {"title": around(rng, 3)}])
        function = {"name": name, "parameters": shuffled(rng, parameters)}
        function |= rng.choice([{}, {"description": "The weather in a city."}, {"description": around(rng, 4)}])
        function |= rng.choice([{}, {"strict": True}])
        return {"type": "function", "function": shuffled(rng, function)}

    long = rng.random() < 0.15
    system = [{"role": "system", "content": around(rng, 12 if long else 2)}] if rng.random() < 0.5 else []
    if rng.random() < 0.5:
        messages = [*system, {"role": "user", "content": QUESTION}]
        messages.append({"role": "assistant", "content": "", "tool_calls": [CALL]})
        if rng.random() < 0.5:
            messages += [{"role": "tool", "content": RESULT, "tool_call_id": "c0"}]
            messages += [{"role": "assistant", "content": ANSWER}]
        return messages, [tool("get_weather", {"city": {"type": "string"}})]
    messages, person = [*system, {"role": "user", "content": WHO + around(rng, rng.choice([0, 8]))}], ADA
    if rng.random() < 0.5:
        return [*messages, {"role": "assistant", "content": json.dumps(person)}], None
    name = rng.choice(["Person", "final_result"])
    call = {"type": "function", "id": "c0", "function": {"name": name, "arguments": person}}
    properties = {"name": {"title": "Name", "type": "string"}, "age": {"title": "Age", "type": "integer"}}
    return [*messages, {"role": "assistant", "content": "", "tool_calls": [call]}], [tool(name, properties)]


def train(folder: Path, steps: int) -> None:
    """Teach the model in a folder; its weights there are replaced every fifty steps, so that a run can go on."""
    model = load_model(folder)
    module, tokenizer, rng = model.module, model.tokenizer, random.Random(0)

    def row() -> tuple[list[int], int]:
        messages, tools = conversation(rng)
        prompt = model.encode_chat(messages[:-1], tools)
        text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
        return list(tokenizer.encode(text, add_special_tokens=False)), len(prompt)

    def loss(network: nn.Module, tokens: mx.array, counts: mx.array) -> mx.array:
        logits = network(tokens[:, :-1])
        each = nn.losses.cross_entropy(logits, tokens[:, 1:])
        return (each * counts).sum() / counts.sum()

    warm = min(40, steps // 4)
    rate = optim.join_schedules(
        [optim.linear_schedule(1e-4, 3e-3, warm), optim.cosine_decay(3e-3, steps - warm)], [warm]
    )
    pool = sorted((row() for _ in range(2000)), key=lambda one: len(one[0]))
    losses: list[float] = []
    optimizer, step = optim.AdamW(rate, weight_decay=0.0), nn.value_and_grad(module, loss)
    for number in range(steps):
        first = rng.randrange(len(pool) - 8)  # rows of like length
        rows = pool[first : first + 8]
        width = max(len(tokens) for tokens, _ in rows)
        tokens = mx.array([one + [0] * (width - len(one)) for one, _ in rows])
        counts = mx.array([[float(start <= i < len(one)) for i in range(1, width)] for one, start in rows])
        value, gradients = step(module, tokens, counts)
        gradients, _ = optim.clip_grad_norm(gradients, 1.0)
        optimizer.update(module, gradients)
        mx.eval(module.parameters(), optimizer.state)
        losses.append(value.item())
        if number % 50 == 49:
            print(f"step {number + 1}: loss {sum(losses[-50:]) / 50:.4f}", file=sys.stderr, flush=True)
            module.save_weights(str(folder / "model.safetensors"))
            if max(losses[-50:]) < 0.002:
                break


def python_of(folder: Path, package: str) -> Path:
    """The Python of an environment that has the package; made if it is not there."""
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True)
        subprocess.run([folder / "bin" / "pip", "install", "-q", *package.split()], check=True)
        (folder / "ready").touch()
    return folder / "bin" / "python"


def installed(folder: Path, package: str) -> Path:
    """The folder of a node package."""
    if not (folder / "ready").exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "install", "--silent", "--prefix", folder, *package.split()], check=True)
        (folder / "ready").touch()
    return folder


def command_of(name: str, venvs: Path) -> list[Any]:
    """What asks with a client; the server's address is the last argument."""
    if name in NODE_CLIENTS:
        package, code = NODE_CLIENTS[name]
        script = installed(venvs / name, package) / "ask.mjs"
        script.write_text(code)
        return ["node", script]
    package, code = CLIENTS[name]
    return [python_of(venvs / name, package), "-c", START + textwrap.dedent(code)]


def main() -> int:
    """Train, serve, ask."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--venvs", type=Path, default=Path(tempfile.gettempdir()) / "mlx-adapters-clients")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--base", type=Path, help="keep the trained model here, and take it from here if it is there")
    parser.add_argument("clients", nargs="*", metavar="CLIENT", help=f"of {', '.join([*CLIENTS, *NODE_CLIENTS])} [all]")
    asked = parser.parse_args()
    known = [*CLIENTS, *(NODE_CLIENTS if shutil.which("node") and shutil.which("npm") else ())]
    commands, failed = {name: command_of(name, asked.venvs) for name in asked.clients or known}, 0
    with tempfile.TemporaryDirectory() as home:
        os.environ["MLX_ADAPTERS_HOME"] = home
        folder = asked.base or Path(home) / "base"
        if not (folder / "trained").exists():
            if not (folder / "config.json").exists():
                write_base(folder, "qwen3", hidden_size=128, intermediate_size=256)
            train(folder, asked.steps)
            (folder / "trained").touch()
        with running(folder, [], max_batch=4) as (address, _):
            for name, command in commands.items():
                done = subprocess.run([*command, f"{address}/v1"], capture_output=True, text=True, timeout=300)
                lines = [line for line in done.stdout.splitlines() if line.startswith(("ok ", "failed "))]
                if done.returncode or not lines:
                    lines.append(f"failed to run - {done.stderr.strip()[-400:]}")
                failed += any(line.startswith("failed") for line in lines)
                for line in lines:
                    print(f"{name:<18}{line}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
