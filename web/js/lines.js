/* The server's figures as lines of text in a language (`say`, of words.js): pure functions. */

const GIB = 1024 ** 3, MIB = 1024 ** 2;
const DISK = "disk";

/* Bytes of memory, in powers of two; of files, in powers of ten, as hubs count. */
export const memorySize = (bytes) => bytes === 0 ? "0"
  : bytes >= GIB ? `${(bytes / GIB).toFixed(1)} GiB` : `${(bytes / MIB).toFixed(1)} MiB`;

export function fileSize(bytes) {
  const [unit, factor] = [["GB", 1e9], ["MB", 1e6], ["KB", 1e3]].find(([, size]) => bytes >= size) ?? ["B", 1];
  return `${factor === 1 ? bytes : (bytes / factor).toFixed(1)} ${unit}`;
}

export function duration(seconds, say) {
  const minutes = Math.floor(seconds / 60), hours = Math.floor(seconds / 3600);
  return hours ? say.hours(hours, minutes % 60) : minutes ? say.minutes(minutes) : say.seconds(Math.round(seconds));
}

const joined = (parts) => parts.filter(Boolean).join(" · ");

/* ---- files of known models */

export const missingParts = (state) => state.parts.filter((part) => part.bytes === null);
const licencesOf = (state, say) => state.licences.map((name) => name.includes("/") ? say.licenceAt(name) : name);

/* What it is and how large, then what is here and what is not. */
export function fileLines(state, say) {
  const first = joined([state.title, state.bytes && say.about(fileSize(state.bytes)), ...licencesOf(state, say)]);
  const here = state.parts.filter((part) => part.bytes !== null).map((part) => `✓ ${part.title} ${fileSize(part.bytes)}`);
  const missing = missingParts(state).map((part) => part.title);
  const last = missing.length ? `✗ ${say.missing(missing.join(", "))}` : say.complete;
  return [first, joined(here), last].filter(Boolean).join("\n");
}

/* The question before a download where the setting is "ask". */
export function question(state, say) {
  const what = missingParts(state).map((part) => `${part.title} (${part.model_id}: ${part.pattern})`).join(", ");
  return say.question(state.title, what, licencesOf(state, say).join(", "));
}

/* Where downloads are off: how to switch them on, or to do without. */
export function offLines(state, say) {
  const patterns = {};
  for (const { model_id: id, pattern } of missingParts(state)) (patterns[id] ??= []).push(pattern);
  const repositories = Object.entries(patterns).map(([id, files]) => `${id} (${files.join(", ")})`);
  return `${say.off}\n${say.byHand(repositories.join(", "))}`;
}

/* How far a download is: the file, how much of how much, how fast, how long still. */
export function downloadLine({ file, done_bytes: done, total_bytes: total, bytes_per_second: speed }, say) {
  const pace = speed ? [say.perSecond(fileSize(Math.round(speed))), say.left(duration((total - done) / speed, say))] : [];
  return joined([file || say.asking, say.of(fileSize(done), fileSize(total)), ...pace]);
}

/* ---- loading */

export function loadingLine(at, say) {
  const room = at.room_bytes === null ? null : say.vramOf(memorySize(at.device_bytes), memorySize(at.room_bytes));
  return joined([say.loading(at.title, at.number, at.count), at.shards > 1 && say.shard(at.shard, at.shards),
    say.of(memorySize(at.done_bytes), memorySize(at.total_bytes)), room]);
}

/* ---- plans */

function placeLine({ device, rests_on: rests, works_from: works }, say) {
  const named = (place) => place === DISK ? say.disk : place;
  if (rests === device) return say.onDevice(device);
  const rest = rests === DISK ? say.onDisk : say.restsOn(rests);
  return rests === works ? rest : say.worksFrom(rest, named(works));
}

function reasonLine(decision, say) {
  const sized = (name) => memorySize(decision[`${name}_bytes`]), fits = (yes) => yes ? say.fit : say.fitNot;
  const ram = [fits(decision.fits_ram), decision.ram_limit === null ? say.freeRam(sized("ram"), sized("reserved"))
    : say.ramLimit(decision.ram_limit)];
  const byRam = say.weightsAndRam(sized("weight"), ...ram);
  if (decision.limit !== null) return say.givenLimit(decision.limit, byRam);
  if (decision.device_bytes === null) return byRam;
  const full = decision.preset === "full";
  const byCard = say.weightsAndCard(sized("weight"), fits(full), sized("device"), sized("computation"));
  return full ? byCard : say.andRam(byCard, ...ram);
}

function planLine(names, plan, size, say) {
  const model = plan.activation_bytes ? say.planAt(names, size) : names;
  const step = memorySize(plan.bytes_per_step);
  const moved = plan.once_bytes ? say.movedOnce(step, memorySize(plan.once_bytes)) : step;
  const line = say.plan(model, memorySize(plan.resident_bytes), memorySize(plan.host_bytes),
    memorySize(plan.read_bytes_per_step), moved, plan.step_seconds.toFixed(2));
  return plan.activation_bytes ? say.forComputation(line, memorySize(plan.activation_bytes)) : line;
}

/* What a pipeline would take: its weights, what decided, the limit, and the plan of each model that moves. */
export function estimateLines(estimate, say) {
  const size = `${estimate.width}×${estimate.height}`;
  const lines = [say.weights(memorySize(estimate.weight_bytes), estimate.dtype, placeLine(estimate, say))];
  if (estimate.decision) lines.push(say.auto(estimate.decision.preset, reasonLine(estimate.decision, say)));
  if (estimate.limit_gib !== null) lines.push(say.limitOf(estimate.limit_gib, estimate.device));
  if (estimate.ram_limit_gib !== null) lines.push(say.waitInRam(estimate.ram_limit_gib));
  for (const [names, plan] of Object.entries(estimate.plans)) lines.push(planLine(names, plan, size, say));
  if (estimate.floor_gib !== null) lines.push(say.tooLow(size, estimate.limit_gib, estimate.floor_gib));
  return lines.join("\n");
}

/* Why there is no estimate. */
export function problemLine({ problem, detail, presets }, say) {
  const words = say.problems[problem];
  return typeof words === "function" ? words(presets) : words ?? detail;
}
