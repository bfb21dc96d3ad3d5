// Who is signed in, in all tabs alike.
//
// A tab keeps the page's half of the token for itself (sessionStorage), and gives it to other tabs
// of this origin over a BroadcastChannel. The end of the session reaches all tabs the same way; a
// tab that nobody tells learns of the end by the stream, or by the next answer.
import { Refused, call, onSignedOut, pageHalf, send, setPageHalf } from "./api";
import type { Me } from "./generated";
import { assertion } from "./passkey";
import { Store } from "./store";

export type Session =
  | { is: "unknown" }
  | { is: "out"; why: "" | "signed_out" | "ended" }
  | { is: "in"; me: Me };

export const session = new Store<Session>({ is: "unknown" });

type Message =
  | { type: "ask" }
  | { type: "have"; half: string }
  | { type: "in"; half: string }
  | { type: "leaving" }
  | { type: "out"; why: "signed_out" | "ended" };

const channel = new BroadcastChannel("countersign-session");

/** answerTime is how long a new tab waits for the half of another tab, in milliseconds. */
const answerTime = 250;

export async function begin() {
  channel.onmessage = (e: MessageEvent<Message>) => {
    const m = e.data;
    switch (m.type) {
      case "ask":
        if (session.get().is === "in") channel.postMessage({ type: "have", half: pageHalf() });
        break;
      case "have":
        if (session.get().is !== "in" && m.half !== pageHalf()) void adopt(m.half);
        break;
      case "in":
        void adopt(m.half);
        break;
      case "leaving":
        leaving = true;
        break;
      case "out":
        leave(m.why);
    }
  };
  onSignedOut(() => end("ended"));
  if (pageHalf()) return adopt(pageHalf());
  channel.postMessage({ type: "ask" });
  setTimeout(() => { if (session.get().is === "unknown") session.set({ is: "out", why: "" }); }, answerTime);
}

/** leaving: a tab signs out. Then the stream may tell of the end before that tab does. */
let leaving = false;

async function adopt(half: string) {
  leaving = false;
  setPageHalf(half);
  try {
    session.set({ is: "in", me: await call("GET /v1/me") });
  } catch {
    leave("ended");
  }
}

function leave(why: "signed_out" | "ended") {
  const was = session.get().is;
  setPageHalf("");
  if (was !== "out") session.set({ is: "out", why: was === "unknown" ? "" : leaving ? "signed_out" : why });
}

/** end forgets the session in all tabs. */
function end(why: "signed_out" | "ended") {
  if (session.get().is === "in") channel.postMessage({ type: "out", why });
  leave(why);
}

/** endedByServer is for the stream: the appliance has said that the session is over. */
export const endedByServer = () => end("ended");

export async function signIn(operator: string) {
  const c = await call("POST /v1/challenges", { body: { purpose: "sign-in", operator } });
  const proof = await assertion(c.public_key);
  const r = await send("POST", "/v1/sessions", { body: JSON.stringify({ challenge: c.id, proof }) }).catch((e) => {
    if (!(e instanceof Refused && e.code === "not_proven")) throw e;
    throw new Refused(e.code, "This passkey does not sign in " + operator,
      `Look at the name, and choose the passkey of ${operator}: the browser offers those of other operators as well.`, e.request);
  });
  const made = await r.json() as { page: string };
  localStorage.setItem("operator", operator);
  await adopt(made.page);
  channel.postMessage({ type: "in", half: made.page });
}

export async function signOut() {
  leaving = true;
  channel.postMessage({ type: "leaving" });
  try { await call("DELETE /v1/sessions/{id}", { path: { id: "current" } }); } catch { /* it is over all the same */ }
  end("signed_out");
}

/** myRoles returns the roles of who is signed in. */
export function myRoles(): readonly string[] {
  const s = session.get();
  return s.is === "in" ? s.me.operator.roles : [];
}
