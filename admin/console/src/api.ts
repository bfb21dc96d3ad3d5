// Calls of the admin API. generated.ts has the types of its operations.
import { roles, proposers } from "./generated";
import type { Error as Problem, Operations, Parameter } from "./generated";

export type Operation = keyof Operations;

/** Refused is an answer of the appliance that is no success, or no answer at all. */
export class Refused extends Error {
  constructor(readonly code: Problem["code"] | "unreachable" | "cancelled", readonly title: string,
    readonly detail: string, readonly request = "") {
    super(detail);
  }
}

type Arguments<K extends Operation> = {
  path?: Operations[K]["path"];
  query?: Operations[K]["query"];
  body?: Operations[K]["body"];
  signal?: AbortSignal | undefined;
};

/** half is the page's half of the session's token; the cookie, which no script can read, is the other one. */
let half = sessionStorage.getItem("half") ?? "";
export const pageHalf = () => half;
export function setPageHalf(to: string) {
  half = to;
  if (to) sessionStorage.setItem("half", to);
  else sessionStorage.removeItem("half");
}

const signedOut = new Set<() => void>();
/** onSignedOut is told when the appliance says that nobody is signed in. */
export const onSignedOut = (do_: () => void) => void signedOut.add(do_);

export function address(path: string, query: Record<string, unknown> = {}): string {
  const q = new URLSearchParams();
  for (const [name, value] of Object.entries(query)) {
    if (value !== undefined && value !== "" && value !== 0) q.set(name, String(value));
  }
  const text = q.toString();
  return text ? path + "?" + text : path;
}

/** send sends a request with the page's half, and throws Refused unless it succeeds. */
export async function send(method: string, path: string, more: RequestInit = {}): Promise<Response> {
  let r: Response;
  try {
    r = await fetch(path, {
      method, credentials: "same-origin", redirect: "error", referrerPolicy: "no-referrer", ...more,
      headers: { "Content-Type": "application/json", "Countersign-Page": half, ...(more.headers as object) },
    });
  } catch (e) {
    if ((e as Error).name === "AbortError") throw new Refused("cancelled", "Cancelled", "");
    throw new Refused("unreachable", "The appliance does not answer",
      "This page can't reach the appliance. It may be starting: the page tries again by itself. " +
      "If it does not come back, look at the daemon on the machine: systemctl status countersignd.");
  }
  if (r.ok) return r;
  const request = r.headers.get("Countersign-Request") ?? "";
  let p: Partial<Problem> = {};
  try { p = await r.json() as Problem; } catch { /* no document of ours */ }
  if (p.code === "signed_out") for (const each of signedOut) each();
  throw new Refused(p.code ?? "unavailable", p.title ?? "It can't be done now", p.detail ?? `HTTP status ${r.status}`, request);
}

async function request<K extends Operation>(op: K, a: Arguments<K>): Promise<Response> {
  const [method, template] = op.split(" ") as [string, string];
  const path = template.replace(/{(\w+)}/g, (_, name: string) =>
    encodeURIComponent(String((a.path as Record<string, unknown>)[name])));
  return send(method, address(path, a.query as Record<string, unknown>),
    { body: a.body === undefined ? null : JSON.stringify(a.body), signal: a.signal ?? null });
}

/** call calls an operation and returns its document. */
export async function call<K extends Operation>(op: K, a: Arguments<K> = {}): Promise<Operations[K]["answer"]> {
  const r = await request(op, a);
  return (r.status === 204 ? undefined : await r.json()) as Operations[K]["answer"];
}

export type Listed<T> = { items: T[]; next: string };

/** page calls a listing and returns one page of it with the cursor of the next one. */
export async function page<K extends Operation>(op: K, a: Arguments<K> = {}): Promise<{ items: Operations[K]["answer"]; next: string }> {
  const r = await request(op, a);
  return { items: await r.json() as Operations[K]["answer"], next: r.headers.get("Countersign-Next") ?? "" };
}

/** may reports whether an operator with some roles may call an operation. */
export function may(mine: readonly string[], op: Operation): boolean {
  const need = roles[op];
  return need.length === 0 || need.includes("*") || need.some((r) => mine.includes(r));
}

/** mayPropose reports whether an operator with some roles may propose an act. */
export function mayPropose(mine: readonly string[], act: string): boolean {
  return (proposers[act] ?? []).some((r) => mine.includes(r));
}

export const parameters = (of: Record<string, string>): Parameter[] =>
  Object.entries(of).map(([name, value]) => ({ name, value }));
