/* The text below the loader: its result, and how far it is. */
import { beforeEach, expect, test } from "vitest";
import { api } from "./stubs/api.js";
import { app } from "./stubs/app.js";
import { makeNode, textOf } from "./helpers.js";
import "../../web/js/loader_text.js";

const TYPE = "DiffSynthBackend_ModelLoader";
const extension = app.extensions.find(({ name }) => name === "DiffSynthBackend.LoaderText");
extension.setup();

class Loader {}
extension.beforeRegisterNodeDef(Loader, { name: TYPE });

let loader;
beforeEach(() => {
  loader = Object.assign(Object.create(Loader.prototype), makeNode(TYPE));
  loader.setSize = () => {};
  const inner = { getNodeById: (id) => (Number(id) === 5 ? loader : null) };
  app.graph = { getNodeById: (id) => (Number(id) === 1 ? loader : Number(id) === 2 ? { subgraph: inner } : null) };
});

test("the result takes the place of how far it was", () => {
  api.send("diffsynth.loading", { node: "1", text: "loading shard 3/9" });
  expect(textOf(loader)).toBe("loading shard 3/9");
  loader.onExecuted({ text: ["Qwen-Image"] });
  expect(textOf(loader)).toBe("Qwen-Image");
  api.send("execution_interrupted", {});
  expect(textOf(loader)).toBe("Qwen-Image");
});

test("an interrupt says so", () => {
  api.send("diffsynth.loading", { node: "1", text: "loading" });
  api.send("execution_interrupted", {});
  expect(textOf(loader)).toBe("loading · stopped");
});

test("a loader in a subgraph is found, and a node that is gone is not missed", () => {
  api.send("diffsynth.loading", { node: "2:5", text: "inside" });
  expect(textOf(loader)).toBe("inside");
  for (const node of ["2:6", "9:5", "7", null]) api.send("diffsynth.loading", { node, text: "nobody" });
  expect(textOf(loader)).toBe("inside");
});
