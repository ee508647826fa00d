/* The plan below VRAM Config: what is asked, when, and what happens to answers that come too late. */
import { beforeEach, expect, test, vi } from "vitest";
import { api } from "./stubs/api.js";
import { app } from "./stubs/app.js";
import { makeNode, textOf } from "./helpers.js";
import { look, queryOf } from "../../web/js/vram_plan.js";

const CONFIG = "DiffSynthBackend_ModelConfig";
const ESTIMATE = { weight_bytes: 2 ** 30, dtype: "float32", device: "cpu", rests_on: "disk", works_from: "disk",
  limit_gib: null, ram_limit_gib: null, decision: null, width: 128, height: 128, plans: {}, floor_gib: null };
let config, loader, graph;
const asked = () => Object.fromEntries(new URLSearchParams(queryOf(config, graph)));
const set = (node, name, value) => { node.widgets.find((widget) => widget.name === name).value = value; };
const settle = async () => { await new Promise((resolve) => { setTimeout(resolve, 0); }); };

beforeEach(() => {
  api.requests = [];
  app.settings["Comfy.Locale"] = "en";
  api.answers["/diffsynth_backend/estimate"] = { estimate: ESTIMATE };
  loader = makeNode("DiffSynthBackend_ModelLoader", { model: "demo", dtype: "automatic" });
  config = makeNode("DiffSynthBackend_VramConfig", { preset: "low", vram_limit: "GiB", "vram_limit.gib": 6,
    offload_dtype: "from preset" }, { getOutputNodes: () => [loader] });
  graph = { _nodes: [config, loader] };
  app.canvas = { graph };
});

test("the query is what the widgets say", () => {
  expect(asked()).toEqual({ model: "demo", dtype: "automatic", preset: "low", limit: "6",
    ram: "none", offload_dtype: "from preset" });
  set(config, "vram_limit", "none");
  expect(asked().limit).toBe("none");
  config.widgets.push({ name: "ram_limit", value: "GiB" }, { name: "ram_limit.gib", value: 12 });
  expect(asked().ram).toBe("12");
});

test("the size of the only empty latent counts", () => {
  graph._nodes.push(makeNode("DiffSynthBackend_EmptyLatent", { width: 128, height: 64 }));
  expect(asked()).toMatchObject({ width: "128", height: "64" });
  graph._nodes.push(makeNode("DiffSynthBackend_EmptyLatent", { width: 512, height: 64 }));
  expect(asked()).not.toHaveProperty("width");
});

test("files come from the connected Model Configs", () => {
  const source = (model) => makeNode(CONFIG, { model });
  loader.widgets = [{ name: "model", value: "model configs" }, { name: "model.family", value: "wan" }];
  loader.inputs = [{ name: "model.configs.config0", link: 1, source: source("vae/a & b.safetensors") },
    { name: "model.configs.config1", link: null }, { name: "vram", link: 2, source: config },
    { name: "extras.extra0", link: 3, source: source("vae/c.safetensors") }];
  expect(asked()).toMatchObject({ family: "wan", file0: "vae/a & b.safetensors", file1: "vae/c.safetensors" });
  expect(asked()).not.toHaveProperty("model");
  loader.inputs[3].source = makeNode("PrimitiveNode");
  expect(queryOf(config, graph)).toBeNull();
});

test("nothing is asked before a change has settled, and then once", async () => {
  look();
  expect(api.requests).toHaveLength(0);
  look();
  look();
  await settle();
  expect(api.requests).toHaveLength(1);
  expect(textOf(config)).toBe("1.0 GiB of weights in float32, on disk");
  set(config, "vram_limit.gib", 7);
  look();
  set(config, "vram_limit.gib", 8);
  look();
  look();
  await settle();
  expect(api.requests.map(({ path }) => new URLSearchParams(path.split("?")[1]).get("limit"))).toEqual(["6", "8"]);
});

test("a late answer about other settings is dropped", async () => {
  const late = [];
  vi.spyOn(api, "fetchApi").mockImplementation(() => new Promise((resolve) => { late.push(resolve); }));
  look();
  look();
  set(config, "preset", "disk");
  look();
  look();
  const answer = (dtype) => ({ ok: true, json: async () => ({ estimate: { ...ESTIMATE, dtype } }) });
  late[1](answer("disk"));
  late[0](answer("low"));
  await settle();
  expect(textOf(config)).toContain("in disk,");
  vi.restoreAllMocks();
});

test("problems are shown, and without a loader nothing is", async () => {
  api.answers["/diffsynth_backend/estimate"] = { problem: "other", detail: "too low" };
  look();
  look();
  await settle();
  expect(textOf(config)).toBe("too low");
  config.getOutputNodes = () => [];
  look();
  look();
  expect(textOf(config)).toBe("");
});

test("another language asks once more", async () => {
  const twice = async () => { look(); look(); await settle(); };
  await twice();
  app.settings["Comfy.Locale"] = "zh";
  await twice();
  await twice();
  expect(textOf(config)).toBe("权重 1.0 GiB（float32），在硬盘上");
  expect(api.requests).toHaveLength(2);
});
