/* Figures as lines of text, in English and Chinese. */
import { expect, test } from "vitest";
import { downloadLine, duration, estimateLines, fileLines, fileSize, loadingLine, memorySize, offLines, problemLine,
  question } from "../../web/js/lines.js";
import { words } from "../../web/js/words.js";

const GIB = 2 ** 30;
const en = words("en"), zh = words("zh");
const STATE = { name: "qwen-image", title: "Qwen-Image", policy: "off", bytes: 57.7e9, licences: ["Apache-2.0"],
  parts: [{ title: "vae", bytes: 253_800_000, model_id: "Qwen/Qwen-Image", pattern: "vae/x.safetensors" },
    { title: "transformer", bytes: null, model_id: "Qwen/Qwen-Image", pattern: "transformer/*.safetensors" }] };
const PLAN = { resident_bytes: 3 * GIB, host_bytes: 0, ring_bytes: GIB, activation_bytes: 2 * GIB,
  bytes_per_step: 26 * GIB, read_bytes_per_step: 26 * GIB, once_bytes: 0, step_seconds: 14.138 };
const ESTIMATE = { weight_bytes: 57 * GIB, dtype: "bfloat16", device: "cuda", rests_on: "disk", works_from: "disk",
  limit_gib: 8, ram_limit_gib: null, decision: null, width: 1328, height: 1328, plans: { dit: PLAN }, floor_gib: null };
const DECISION = { preset: "disk", weight_bytes: 57 * GIB, ram_bytes: 30 * GIB, fits_ram: false, device_bytes: 24 * GIB,
  computation_bytes: 4.8 * GIB, limit: null, ram_limit: null, reserved_bytes: 2 * GIB };

test("sizes and times", () => {
  expect([57.7e9, 2.5e6, 1000, 12].map(fileSize)).toEqual(["57.7 GB", "2.5 MB", "1.0 KB", "12 B"]);
  expect([0, 2 ** 19, 1.5 * GIB].map(memorySize)).toEqual(["0", "0.5 MiB", "1.5 GiB"]);
  expect([5.4, 65, 7260].map((seconds) => duration(seconds, en))).toEqual(["5 s", "1 min", "2 h 1 min"]);
  expect([5.4, 65, 7260].map((seconds) => duration(seconds, zh))).toEqual(["5 秒", "1 分", "2 小时 1 分"]);
});

test("what is here, what is not, and the licence", () => {
  expect(fileLines(STATE, en)).toBe(
    "Qwen-Image · about 57.7 GB · Apache-2.0\n✓ vae 253.8 MB\n✗ missing: transformer");
  const whole = { ...STATE, bytes: null, parts: [STATE.parts[0]], licences: ["huggingface.co/a/b"] };
  expect(fileLines(whole, zh)).toBe("Qwen-Image · 见 huggingface.co/a/b\n✓ vae 253.8 MB\n完整");
});

test("question and refusal name files, owner and licence", () => {
  for (const say of [en, zh]) {
    for (const part of ["transformer/*.safetensors", "Qwen/Qwen-Image", "Apache-2.0"])
      expect(question(STATE, say)).toContain(part);
    expect(offLines(STATE, say)).toContain("Qwen/Qwen-Image (transformer/*.safetensors)");
    expect(offLines(STATE, say)).not.toContain("vae");
    const more = { ...STATE.parts[1], pattern: "vae/*" };
    expect(offLines({ ...STATE, parts: [STATE.parts[1], more] }, say)).toContain("(transformer/*.safetensors, vae/*)");
  }
});

test("how far a download is", () => {
  const at = { file: "m.safetensors", done_bytes: 1e9, total_bytes: 4e9, bytes_per_second: 0 };
  expect(downloadLine(at, en)).toBe("m.safetensors · 1.0 GB of 4.0 GB");
  expect(downloadLine({ ...at, file: "", bytes_per_second: 1e6 }, zh)).toBe(
    "正在询问模型站 · 1.0 GB / 4.0 GB · 1.0 MB/秒 · 还需 50 分");
});

test("how far a load is", () => {
  const at = { title: "b", number: 2, count: 2, shard: 1, shards: 1, done_bytes: GIB / 2, total_bytes: 2 * GIB,
    device_bytes: 5.5 * GIB, room_bytes: null };
  expect(loadingLine(at, en)).toBe("loading b (2 of 2) · 512.0 MiB of 2.0 GiB");
  expect(loadingLine({ ...at, shards: 2, room_bytes: 6 * GIB }, en)).toBe(
    "loading b (2 of 2) · shard 1/2 · 512.0 MiB of 2.0 GiB · VRAM 5.5 GiB of 6.0 GiB");
});

test("a plan", () => {
  expect(estimateLines(ESTIMATE, en).split("\n")).toEqual(["57.0 GiB of weights in bfloat16, on disk",
    "limit: 8 GiB of cuda", "dit at 1328×1328: 3.0 GiB stay on the device, 0 wait in RAM, 26.0 GiB on disk; "
      + "26.0 GiB cross per step, 14.14 s expected; about 2.0 GiB for the computation"]);
  expect(estimateLines(ESTIMATE, zh).split("\n")[2]).toBe("dit（1328×1328）：3.0 GiB 常驻显卡，0 在内存中等待，"
    + "26.0 GiB 在硬盘上；每步传输 26.0 GiB，预计 14.14 秒；计算约需 2.0 GiB");
  const vae = { ...PLAN, activation_bytes: 0, once_bytes: GIB };
  expect(estimateLines({ ...ESTIMATE, plans: { vae } }, en).split("\n")[2]).toMatch(
    /^vae: .*26.0 GiB cross per step after|^vae: .*26.0 GiB after 1.0 GiB once/);
});

test("layers of the disk that wait in RAM", () => {
  expect(estimateLines({ ...ESTIMATE, ram_limit_gib: 12 }, en).split("\n")[2]).toMatch(/^RAM: 12 GiB for layers/);
  expect(estimateLines({ ...ESTIMATE, ram_limit_gib: 12 }, zh).split("\n")[2]).toMatch(/^内存：12 GiB/);
});

test("where weights are", () => {
  const where = (rests_on, works_from, say = en) => estimateLines({ ...ESTIMATE, rests_on, works_from, plans: {} }, say)
    .split("\n")[0].split(/bfloat16, |），/)[1];
  expect([where("cuda", "cuda"), where("disk", "disk"), where("cpu", "cpu"), where("cpu", "cuda"), where("disk", "cpu")])
    .toEqual(["on cuda", "on disk", "rests on cpu", "rests on cpu, works from cuda", "on disk, works from cpu"]);
  expect(where("cpu", "disk", zh)).toBe("存放在 cpu，工作时在 硬盘");
});

test("what auto came to, and why", () => {
  const reason = (more, say = en) => estimateLines({ ...ESTIMATE, decision: { ...DECISION, ...more } }, say).split("\n")[1];
  const ram = "do not fit 30.0 GiB of free RAM (2.0 GiB are left to the system)";
  expect(reason({})).toBe("auto: disk, because 57.0 GiB of weights do not fit the card's 24.0 GiB beside 4.8 GiB for the "
    + `computation; they ${ram}`);
  expect(reason({ preset: "full", device_bytes: 80 * GIB })).toBe(
    "auto: full, because 57.0 GiB of weights fit the card's 80.0 GiB beside 4.8 GiB for the computation");
  expect(reason({ device_bytes: null })).toBe(`auto: disk, because 57.0 GiB of weights ${ram}`);
  expect(reason({ limit: 8 })).toBe(`auto: disk, because vram_limit is 8 GiB, and 57.0 GiB of weights ${ram}`);
  expect(reason({ ram_limit: 40, device_bytes: null })).toBe(
    "auto: disk, because 57.0 GiB of weights do not fit the ram_limit of 40 GiB");
  expect(reason({}, zh)).toBe("auto：选择 disk，因为显存 24.0 GiB 除去计算所需的 4.8 GiB，放不下 57.0 GiB 的权重；"
    + "空闲内存 30.0 GiB（其中 2.0 GiB 留给系统）放不下");
});

test("a limit that is too low says what would do", () => {
  const low = { ...ESTIMATE, plans: {}, limit_gib: 1, floor_gib: 2.31 };
  expect(estimateLines(low, en)).toContain("1328×1328 does not fit: the limit is 1 GiB, and the least that would do is "
    + "2.31 GiB.");
  expect(estimateLines(low, zh)).toContain("1328×1328 放不下：上限为 1 GiB，至少需要 2.31 GiB。");
});

test("problems have words where they have names", () => {
  expect(problemLine({ problem: "missing" }, zh)).toContain("缺少");
  expect(problemLine({ problem: "nothing_moves", presets: "low, disk" }, en)).toContain("(low, disk)");
  expect(problemLine({ problem: "other", detail: "in English" }, zh)).toBe("in English");
});
