/* The text below the loader: its result, and how far it is. */
import { beforeEach, expect, test } from "vitest";
import { api } from "./stubs/api.js";
import { app } from "./stubs/app.js";
import { makeNode, textOf } from "./helpers.js";
import { showText } from "../../web/js/node_text.js";
import "../../web/js/loader_text.js";

const TYPE = "DiffSynthBackend_ModelLoader";
const extension = app.extensions.find(({ name }) => name === "DiffSynthBackend.LoaderText");
extension.setup();

class Loader {}
extension.beforeRegisterNodeDef(Loader, { name: TYPE });

const AT = { title: "demo/dit", number: 2, count: 3, shard: 3, shards: 9, done_bytes: 2 ** 30, total_bytes: 2 ** 31,
  device_bytes: 0, room_bytes: null };
const load = (node, title) => api.send("diffsynth.loading", { ...AT, node, title });

let loader;
beforeEach(() => {
  loader = Object.assign(Object.create(Loader.prototype), makeNode(TYPE));
  loader.setSize = () => {};
  const inner = { getNodeById: (id) => (Number(id) === 5 ? loader : null) };
  app.graph = { getNodeById: (id) => (Number(id) === 1 ? loader : Number(id) === 2 ? { subgraph: inner } : null) };
});

test("the result takes the place of how far it was", () => {
  load("1", "a");
  expect(textOf(loader)).toBe("loading a (2 of 3) · shard 3/9 · 1.0 GiB of 2.0 GiB");
  loader.onExecuted({ text: ["Qwen-Image"] });
  expect(textOf(loader)).toBe("Qwen-Image");
  api.send("execution_interrupted", {});
  expect(textOf(loader)).toBe("Qwen-Image");
});

test("an interrupt says so", () => {
  app.settings["Comfy.Locale"] = "zh";
  load("1", "a");
  api.send("execution_interrupted", {});
  expect(textOf(loader)).toBe("正在加载 a（2/3） · 分片 3/9 · 1.0 GiB / 2.0 GiB · 已停止");
  app.settings["Comfy.Locale"] = "en";
});

test("a loader in a subgraph is found, and a node that is gone is not missed", () => {
  load("2:5", "inside");
  expect(textOf(loader)).toContain("inside");
  for (const node of ["2:6", "9:5", "7", null]) load(node, "nobody");
  expect(textOf(loader)).toContain("inside");
});

test("the node grows with its text, and more with wide characters", () => {
  const heightFor = (text) => {
    const node = makeNode(TYPE, {}, { size: [240, 100] });
    showText(node, text);
    return node.size[1];
  };
  expect(heightFor("a".repeat(400))).toBeGreaterThan(heightFor("a".repeat(40)));
  expect(heightFor("长".repeat(200))).toBe(heightFor("a".repeat(400)));
});
