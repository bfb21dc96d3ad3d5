// What happens on the appliance, as it happens: GET /v1/stream.
//
// A browser opens at most six connections to one host, so all tabs share one stream. The tab that
// has the Web Lock reads the stream, and tells the others over a BroadcastChannel. When the tab
// closes, the browser gives the lock to the next one, which goes on from the last event.
import { Refused, send } from "./api";
import type { Event, Health } from "./generated";
import { endedByServer, session } from "./session";
import { Store } from "./store";

export type Tick = { time_ms: number; figures: Record<string, number | null> };

export const health = new Store<Health | null>(null);
/** ticks has the last seconds, the oldest first. */
export const ticks = new Store<Tick[]>([]);
/** connected is false while nobody tells this tab anything. */
export const connected = new Store(false);

const maxTicks = 120;
/** silence is the time without a sign of life after which a connection is dead, in milliseconds. */
const silence = 45_000;

type Listener = (topic: string, e: Event) => void;
const listeners = new Set<Listener>();
/** onEvent is told of each streamed event, with its topic; gap: events were missed, so lists are old. */
export function onEvent(l: Listener): () => void {
  listeners.add(l);
  return () => void listeners.delete(l);
}

const channel = new BroadcastChannel("countersign-live");
type Message = { type: "sse"; topic: string; id: string; data: unknown } | { type: "hello" } | { type: "connected"; is: boolean };

let last = ""; // id of the last event
let leading = false;

function take(topic: string, id: string, data: unknown) {
  if (id) last = id;
  connected.set(true);
  switch (topic) {
    case "state":
      health.set(data as Health);
      break;
    case "tick":
      ticks.set([...ticks.get().slice(1 - maxTicks), data as Tick]);
      break;
    case "end":
      if ((data as { code: string }).code === "signed_out") endedByServer();
      break;
    default:
      for (const each of [...listeners]) each(topic, data as Event);
  }
}

channel.onmessage = (e: MessageEvent<Message>) => {
  const m = e.data;
  if (m.type === "sse" && session.get().is === "in") take(m.topic, m.id, m.data);
  else if (m.type === "connected") connected.set(m.is);
  else if (m.type === "hello" && leading) {
    if (health.get()) channel.postMessage({ type: "sse", topic: "state", id: last, data: health.get() });
    channel.postMessage({ type: "connected", is: connected.get() });
  }
};

const tell = (topic: string, id: string, data: unknown) => {
  channel.postMessage({ type: "sse", topic, id, data });
  take(topic, id, data);
};

/** follow keeps this tab told for as long as its session lasts. */
export function follow() {
  const over = new AbortController();
  const ended = session.follow((s) => {
    if (s.is !== "in") {
      over.abort();
      ended();
      health.set(null);
      ticks.set([]);
      connected.set(false);
    }
  });
  channel.postMessage({ type: "hello" });
  void navigator.locks.request("countersign-stream", { signal: over.signal }, async () => {
    leading = true;
    for (let failures = 0; !over.signal.aborted;) {
      try {
        await read(over.signal, () => { failures = 0; });
      } catch (e) {
        if (e instanceof Refused && (e.code === "signed_out" || e.code === "cancelled" && over.signal.aborted)) break;
        failures++;
      }
      if (over.signal.aborted) break;
      connected.set(false);
      channel.postMessage({ type: "connected", is: false });
      await new Promise((r) => setTimeout(r, Math.min(500 * 2 ** failures, 5000)));
    }
    leading = false;
  }).catch(() => { /* the session has ended before the lock came */ });
}

/** read reads one connection to its end. */
async function read(over: AbortSignal, alive: () => void) {
  const stop = new AbortController();
  const onOver = () => stop.abort();
  over.addEventListener("abort", onOver);
  let timer = setTimeout(onOver, silence);
  try {
    const r = await send("GET", "/v1/stream", {
      signal: stop.signal, headers: last ? { "Last-Event-ID": last } : {}, cache: "no-store",
    });
    const reader = r.body!.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "", topic = "", id = "", data = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      alive();
      clearTimeout(timer);
      timer = setTimeout(onOver, silence);
      const lines = (rest + value).split("\n");
      rest = lines.pop()!;
      for (const line of lines) {
        const at = line.indexOf(":");
        const text = line.slice(at + 1).replace(/^ /, "");
        if (line === "") {
          if (data) tell(topic, id, JSON.parse(data));
          else if (id) last = id;
          topic = id = data = "";
        } else if (line.startsWith("event:")) topic = text;
        else if (line.startsWith("id:")) id = text;
        else if (line.startsWith("data:")) data += text;
      }
    }
  } catch (e) {
    if (stop.signal.aborted) throw new Refused("cancelled", "", "");
    throw e;
  } finally {
    clearTimeout(timer);
    over.removeEventListener("abort", onOver);
    stop.abort();
  }
}
