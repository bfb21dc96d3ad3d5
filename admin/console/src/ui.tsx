// The components that all pages share: one table, one form, one dialog, one id, one time, one
// state, one empty state, one error.
import type { ComponentChildren, JSX, TargetedKeyboardEvent } from "preact";
import { useCallback, useEffect, useId, useLayoutEffect, useRef, useState } from "preact/hooks";
import { Refused } from "./api";
import { onEvent } from "./live";
import { Store, useStore } from "./store";

type Children = { children?: ComponentChildren };

// ---- Text of strangers -------------------------------------------------------------------------

/** hidden are characters that a reader does not see, or that turn the text around. */
const hidden = /[\p{Cc}\p{Cf}\p{Co}\p{Cn}\u2028\u2029\u115f\u1160\u3164\uffa0]/u;

/** Text shows a text as it is: characters that can't be seen show their numbers. */
export function Text({ children, lines }: { children: string; lines?: boolean }) {
  const parts: ComponentChildren[] = [];
  let plain = "";
  for (const c of children) {
    if (!hidden.test(c) || lines && c === "\n") {
      plain += c;
      continue;
    }
    parts.push(plain, <mark class="hidden" title="a character that can't be seen">{"U+" + c.codePointAt(0)!.toString(16).toUpperCase().padStart(4, "0")}</mark>);
    plain = "";
  }
  parts.push(plain);
  return <bdi>{parts}</bdi>;
}

/** Words shows a name such as SignatureAdmitted, which breaks between its words only. */
export function Words({ children }: { children: string }) {
  return <span class="words">{children.split(/(?=[A-Z])/).map((w, i) => <>{i > 0 && <wbr />}{w}</>)}</span>;
}

// ---- State: a colour with a shape --------------------------------------------------------------

export type Tone = "ok" | "warn" | "crit" | "info" | "off";

const shapes: Record<Tone, JSX.Element> = {
  ok: <circle cx="6" cy="6" r="4.5" />,
  warn: <path d="M6 1 11.4 10.6H.6Z" />,
  crit: <path d="M6 .2 11.8 6 6 11.8.2 6Z" />,
  info: <circle cx="6" cy="6" r="4" fill="none" stroke="currentColor" stroke-width="2" />,
  off: <path d="M1.5 5h9v2h-9Z" />,
};

export function Shape({ tone }: { tone: Tone }) {
  return <svg class={"shape " + tone} viewBox="0 0 12 12" width="12" height="12" aria-hidden="true" fill="currentColor">{shapes[tone]}</svg>;
}

export function State({ tone, children }: { tone: Tone } & Children) {
  return <span class={"state " + tone}><Shape tone={tone} /><span>{children}</span></span>;
}

// ---- Times: local, UTC on hover ----------------------------------------------------------------

/** now turns each half minute, for relative times. */
const now = new Store(Date.now());
setInterval(() => now.set(Date.now()), 30_000);

const pad = (n: number) => String(n).padStart(2, "0");
const months = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

export function localTime(ms: number, seconds = true): string {
  const d = new Date(ms), today = new Date();
  const day = d.toDateString() === today.toDateString() ? "" :
    `${d.getDate()} ${months[d.getMonth()]}${d.getFullYear() === today.getFullYear() ? "" : " " + d.getFullYear()}, `;
  return `${day}${pad(d.getHours())}:${pad(d.getMinutes())}${seconds ? ":" + pad(d.getSeconds()) : ""}`;
}

const utc = (ms: number) => new Date(ms).toISOString().replace("T", " ").replace(/\.\d+Z$/, "") + " UTC";

/** span tells a number of seconds in its two largest units. */
export function span(seconds: number): string {
  let rest = Math.max(0, Math.round(seconds));
  const out: string[] = [];
  for (const [unit, size] of [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]] as const) {
    if (rest >= size && out.length < 2) {
      out.push(`${Math.floor(rest / size)} ${unit}`);
      rest %= size;
    } else if (out.length) break;
  }
  return out.join(" ") || "0 s";
}

/** coarse tells a number of seconds in its largest unit. */
const coarse = (seconds: number) => span(seconds).split(" ").slice(0, 2).join(" ");

/** Time shows a moment in local time, with UTC in its title. */
export function Time({ s, ms, ago, none = "never" }: { s?: number; ms?: number; ago?: boolean; none?: string }) {
  const at = ms ?? (s ?? 0) * 1000;
  const present = useStore(now);
  if (!at) return <span class="quiet">{none}</span>;
  const off = (Math.max(present, Date.now()) - at) / 1000;
  const told = !ago ? localTime(at) : off < -1 ? "in " + coarse(-off) : off < 60 ? "just now" : coarse(off) + " ago";
  return <time dateTime={new Date(at).toISOString()} title={(ago ? localTime(at) + " · " : "") + utc(at)}>{told}</time>;
}

// ---- Ids: short, and copied whole --------------------------------------------------------------

/** Copy copies a text. */
export function Copy({ text, of }: { text: string; of: string }) {
  const [done, setDone] = useState(false);
  return <button type="button" class="copy" aria-label={done ? "Copied" : "Copy " + of} title={done ? "Copied" : "Copy " + of}
    onClick={async () => {
      await navigator.clipboard.writeText(text);
      setDone(true);
      setTimeout(() => setDone(false), 1500);
    }}>
    <svg viewBox="0 0 12 12" width="12" height="12" aria-hidden="true" fill="none" stroke="currentColor" stroke-width="1.4">
      {done ? <path d="m1.5 6.5 3 3 6-7" /> : <path d="M4 3.5V1h7v7.5H8.5M1 3.5h7.5V11H1Z" />}
    </svg>
    <span role="status" class="unseen">{done ? "Copied" : ""}</span>
  </button>;
}

/** Id shows an id in a short form, with a button that copies it whole. */
export function Id({ children, of = "id", whole }: { children: string; of?: string; whole?: boolean }) {
  const short = whole || children.length <= 20 ? children : children.slice(0, 10) + "…" + children.slice(-6);
  return <span class="id"><code class={whole ? "whole" : undefined} title={short === children ? undefined : children}><Text>{short}</Text></code><Copy text={children} of={of} /></span>;
}

/** Command shows commands that are copied as they are. */
export function Command({ children, of = "command" }: { children: string; of?: string }) {
  return <div class="command"><pre tabIndex={0} aria-label={of}>{children}</pre><Copy text={children} of={of} /></div>;
}

// ---- Errors, waiting, nothing ------------------------------------------------------------------

/** next says what a person does about a refusal. */
function next(e: Refused): string {
  switch (e.code) {
    case "not_allowed": return "Ask an operator who has the role.";
    case "rate_limited": return "Wait a moment, and try again.";
    case "locked": return "An administrator unlocks the appliance: see the overview.";
    case "rolled_back": return "See the overview for what to do.";
    case "unavailable": return "Try again; if it stays so, the overview says what is wrong.";
    default: return "";
  }
}

/** Problem says what happened and what to do. */
export function Problem({ error, again }: { error: unknown; again?: (() => void) | undefined }) {
  const e = error instanceof Refused ? error : new Refused("unavailable", "This page has failed", String((error as Error)?.message ?? error));
  return <div class="problem" role="alert">
    <State tone={e.code === "cancelled" ? "info" : "crit"}><strong>{e.title}</strong></State>
    <p><Text>{e.detail}</Text> {next(e)}</p>
    {e.request && <p class="quiet">Request <Id of="request id">{e.request}</Id></p>}
    {again && <button type="button" onClick={again}>Try again</button>}
  </div>;
}

/** Empty says what will be here, and how it comes here. */
export function Empty({ title, children }: { title: string } & Children) {
  return <div class="empty"><p><strong>{title}</strong></p><div>{children}</div></div>;
}

export function Waiting({ of = "Loading" }: { of?: string }) {
  return <p class="waiting" role="status"><span class="bar" aria-hidden="true" />{of}…</p>;
}

// ---- Loading -----------------------------------------------------------------------------------

export type Loaded<T> = { data: T | undefined; error: unknown; loading: boolean; reload: () => void };

/** useLoad loads a document, and loads it again after events of the given topics. */
export function useLoad<T>(load: (signal: AbortSignal) => Promise<T>, deps: unknown[], topics: string[] = []): Loaded<T> {
  const [state, setState] = useState<{ data: T | undefined; error: unknown; loading: boolean }>(
    { data: undefined, error: undefined, loading: true });
  const [turn, setTurn] = useState(0);
  const reload = useCallback(() => setTurn((n) => n + 1), []);
  const key = JSON.stringify(deps);
  const shown = useRef("");
  useLayoutEffect(() => { // the request leaves before the browser paints
    const stop = new AbortController();
    const fresh = shown.current !== key;
    shown.current = key;
    setState((s) => ({ data: fresh ? undefined : s.data, error: undefined, loading: true }));
    load(stop.signal).then(
      (data) => { if (!stop.signal.aborted) setState({ data, error: undefined, loading: false }); },
      (error) => { if (!stop.signal.aborted) setState((s) => ({ data: s.data, error, loading: false })); });
    return () => stop.abort();
  }, [key, turn]);
  useEffect(() => {
    if (!topics.length) return;
    let timer = 0;
    const end = onEvent((topic) => {
      if ((topics.includes(topic) || topic === "gap") && !timer) timer = window.setTimeout(() => { timer = 0; reload(); }, 150);
    });
    return () => { end(); clearTimeout(timer); };
  }, [topics.join()]);
  return { ...state, reload };
}

/** Load shows a loaded document, its error, or that it is loading. */
export function Load<T>({ of, children, what }: { of: Loaded<T>; children: (data: T) => ComponentChildren; what?: string }) {
  return <>
    {of.error !== undefined && <Problem error={of.error} again={of.reload} />}
    {of.data !== undefined ? children(of.data) : of.loading && <Waiting of={what} />}
  </>;
}

export function Mark() {
  return <svg viewBox="0 0 32 32" width="24" height="24" aria-hidden="true"><rect width="32" height="32" rx="5" fill="#12454a" /><path d="M7 12.5c4-6 8 7 11 1s5-2 7-3" fill="none" stroke="#f4efe2" stroke-width="2.2" stroke-linecap="round" /><path d="M7 22h18M7 25.5h18" stroke="#d8a657" stroke-width="1.6" /></svg>;
}

// ---- Page and sections -------------------------------------------------------------------------

export function Page({ title, lead, actions, children, back }: {
  title: ComponentChildren; name?: string; lead?: ComponentChildren; actions?: ComponentChildren; back?: { to: string; name: string };
} & Children) {
  const head = useRef<HTMLHeadingElement>(null);
  useEffect(() => { document.title = (head.current?.textContent ?? "") + " · Countersign"; });
  return <>
    <header class="page">
      {back && <a class="back" href={back.to}>← {back.name}</a>}
      <h1 ref={head} tabIndex={-1}>{title}</h1>
      {actions && <div class="actions">{actions}</div>}
      {lead && <p class="lead">{lead}</p>}
    </header>
    {children}
  </>;
}

export function Section({ title, note, children, actions }: { title: string; note?: ComponentChildren; actions?: ComponentChildren } & Children) {
  const id = useId();
  return <section class="sheet" aria-labelledby={id}>
    <div class="margin"><h2 id={id}>{title}</h2>{note && <p class="note">{note}</p>}{actions && <div class="actions">{actions}</div>}</div>
    <div class="body">{children}</div>
  </section>;
}

/** Facts is a list of names with values. */
export function Facts({ of }: { of: ([string, ComponentChildren] | false | undefined | "" | 0)[] }) {
  return <dl class="facts">{of.map((each) => each && <div key={each[0]}><dt>{each[0]}</dt><dd>{each[1]}</dd></div>)}</dl>;
}

// ---- Table -------------------------------------------------------------------------------------

export type Column<T> = {
  head: string;
  cell: (row: T) => ComponentChildren;
  num?: boolean;
  /** quiet columns are left out on a narrow screen. */
  quiet?: boolean;
  /** name columns keep room for a word of some length. */
  name?: boolean;
};

/** Table is the one table. On a narrow screen, each row is a block with the heads as labels. */
export function Table<T>({ name, rows, columns, id, empty, more, loading }: {
  name: string; rows: T[]; columns: Column<T>[]; id: (row: T) => string | number;
  empty: ComponentChildren; more?: (() => void) | undefined; loading?: boolean;
}) {
  if (!rows.length && !more) return <>{empty}</>;
  const kind = (c: Column<T>) => [c.num && "num", c.quiet && "wide", c.name && "name"].filter(Boolean).join(" ");
  return <>
    <table role="table" aria-label={name} onKeyDown={rowKeys}>
      <thead role="rowgroup"><tr role="row">{columns.map((c) => <th role="columnheader" scope="col" class={kind(c)} key={c.head}>{c.head}</th>)}</tr></thead>
      <tbody role="rowgroup">{rows.map((row) => <tr role="row" key={id(row)}>
        {columns.map((c) => <td role="cell" class={kind(c)} data-head={c.head} key={c.head}><div>{c.cell(row)}</div></td>)}
      </tr>)}</tbody>
    </table>
    {more && <button type="button" class="more" onClick={more} disabled={loading}>{loading ? "Loading…" : "Show more"}</button>}
  </>;
}

/** rowKeys moves the focus between the links of rows by the arrow keys. */
function rowKeys(e: TargetedKeyboardEvent<HTMLTableElement>) {
  if (e.key !== "ArrowDown" && e.key !== "ArrowUp" || (e.target as Element).tagName !== "A") return;
  const all = [...e.currentTarget.querySelectorAll<HTMLElement>("tbody tr td:first-child a")];
  const to = all[all.indexOf(e.target as HTMLElement) + (e.key === "ArrowDown" ? 1 : -1)];
  if (to) { e.preventDefault(); to.focus(); }
}

/** useList loads a listing page by page. */
export function useList<T>(load: (after: string, signal: AbortSignal) => Promise<{ items: T[]; next: string }>, deps: unknown[], topics: string[] = []) {
  const first = useLoad((signal) => load("", signal), deps, topics);
  const [later, setLater] = useState<{ of: unknown; items: T[]; next: string } | null>(null);
  const [loading, setLoading] = useState(false);
  const [error, setError] = useState<unknown>();
  const fits = later && later.of === first.data;
  const next = fits ? later.next : first.data?.next ?? "";
  return {
    ...first,
    error: first.error ?? error,
    items: [...(first.data?.items ?? []), ...(fits ? later.items : [])],
    more: next ? async () => {
      setLoading(true);
      setError(undefined);
      try {
        const got = await load(next, new AbortController().signal);
        setLater({ of: first.data, items: [...(fits ? later.items : []), ...got.items], next: got.next });
      } catch (e) { setError(e); }
      setLoading(false);
    } : undefined,
    loadingMore: loading,
  };
}

// ---- Form --------------------------------------------------------------------------------------

/** Form is the one form: it shows the refusal of its act, and that the act runs. */
export function Form({ submit, act, children, cancel, danger, can = true }: {
  submit: string; act: () => Promise<void>; cancel?: (() => void) | undefined; danger?: boolean; can?: boolean;
} & Children) {
  const [busy, setBusy] = useState(false);
  const [error, setError] = useState<unknown>();
  return <form onSubmit={async (e) => {
    e.preventDefault();
    if (busy || !can) return;
    setBusy(true);
    setError(undefined);
    try { await act(); } catch (x) { setError(x); } finally { setBusy(false); }
  }}>
    {children}
    {error !== undefined && <Problem error={error} />}
    <div class="buttons">
      <button class={danger ? "danger" : "primary"} disabled={busy || !can}>{busy ? "Working…" : submit}</button>
      {cancel && <button type="button" onClick={cancel}>Cancel</button>}
      {busy && <span class="bar" role="progressbar" aria-label="Working" />}
    </div>
  </form>;
}

/** ActButton is a button of a row whose act needs no form: it shows the refusal beside itself. */
export function ActButton({ act, children }: { act: () => Promise<void> } & Children) {
  const [busy, setBusy] = useState(false);
  const [error, setError] = useState<unknown>();
  return <>
    <button type="button" disabled={busy} onClick={async () => {
      setBusy(true);
      setError(undefined);
      try { await act(); } catch (x) { setError(x); } finally { setBusy(false); }
    }}>{children}</button>
    {error !== undefined && <Problem error={error} />}
  </>;
}

export function Field({ label, help, children }: { label: string; help?: ComponentChildren; children: (id: string, helpId: string | undefined) => ComponentChildren }) {
  const id = useId();
  return <div class="field">
    <label for={id}>{label}</label>
    {children(id, help ? id + "-help" : undefined)}
    {help && <p class="help" id={id + "-help"}>{help}</p>}
  </div>;
}

/** Input is a field of one line, or of several. */
export function Input({ label, help, value, set, lines, ...more }: {
  label: string; help?: ComponentChildren; value: string; set: (v: string) => void; lines?: number;
  type?: "text" | "search" | "datetime-local"; required?: boolean; maxLength?: number; placeholder?: string; name?: string;
  autocomplete?: string; autofocus?: boolean; inputMode?: "numeric" | "text";
}) {
  return <Field label={label} help={help}>{(id, helpId) => lines
    ? <textarea id={id} aria-describedby={helpId} rows={lines} spellcheck={false} value={value} onInput={(e) => set(e.currentTarget.value)} required={!!more.required} />
    : <input id={id} aria-describedby={helpId} autocomplete="off" autocapitalize="off" spellcheck={false} {...more as object} value={value} onInput={(e) => set(e.currentTarget.value)} />}
  </Field>;
}

export function Select({ label, help, value, set, options }: {
  label: string; help?: ComponentChildren; value: string; set: (v: string) => void; options: [value: string, name: string][];
}) {
  return <Field label={label} help={help}>{(id, helpId) =>
    <select id={id} aria-describedby={helpId} value={value} onChange={(e) => set(e.currentTarget.value)}>
      {options.map(([v, name]) => <option value={v} key={v}>{name}</option>)}
    </select>}
  </Field>;
}

// ---- Dialog ------------------------------------------------------------------------------------

/** Dialog is the one dialog. The browser keeps the focus inside; Escape closes it. */
export function Dialog({ title, close, children }: { title: string; close: () => void } & Children) {
  const ref = useRef<HTMLDialogElement>(null);
  const id = useId();
  useEffect(() => {
    const d = ref.current!, before = document.activeElement as HTMLElement | null;
    d.showModal();
    return () => { d.close(); before?.focus?.(); };
  }, []);
  return <dialog ref={ref} aria-labelledby={id} onCancel={(e) => { e.preventDefault(); close(); }}>
    <header><h2 id={id}>{title}</h2><button type="button" class="plain" aria-label="Close" onClick={close}>✕</button></header>
    <div class="body">{children}</div>
  </dialog>;
}

/** Confirm asks for a name before something is lost. */
export function Confirm({ title, name, what, submit, act, close, children }: {
  title: string; name: string; what: ComponentChildren; submit: string; act: () => Promise<void>; close: () => void;
} & Children) {
  const [typed, setTyped] = useState("");
  return <Dialog title={title} close={close}>
    <Form submit={submit} danger act={act} cancel={close} can={typed === name}>
      <div class="loss"><State tone="warn">{what}</State></div>
      {children}
      <Input label={`Type ${name} to go on`} value={typed} set={setTyped} required />
    </Form>
  </Dialog>;
}

// ---- Figures -----------------------------------------------------------------------------------

/** Spark draws the last values of a figure. */
export function Spark({ values, label }: { values: (number | null)[]; label: string }) {
  const known = values.filter((v): v is number => v !== null);
  if (known.length < 2) return <span class="spark quiet" />;
  const max = Math.max(...known, 1e-9), w = 96, h = 20, step = w / (values.length - 1);
  let path = "", pen = false;
  values.forEach((v, i) => {
    if (v === null) { pen = false; return; }
    path += `${pen ? "L" : "M"}${(i * step).toFixed(1)} ${(h - 3 - (v / max) * (h - 6)).toFixed(1)}`;
    pen = true;
  });
  return <svg class={Math.max(...known) > 0 ? "spark" : "spark flat"} viewBox={`0 0 ${w} ${h}`} width={w} height={h} role="img" aria-label={label} preserveAspectRatio="none"><path d={path} /></svg>;
}

export function bytes(n: number): string {
  for (const unit of ["bytes", "KiB", "MiB", "GiB", "TiB"]) {
    if (Math.abs(n) < 1024 || unit === "TiB") return `${unit === "bytes" ? n : n.toFixed(n < 10 ? 1 : 0)} ${unit}`;
    n /= 1024;
  }
  return "";
}

export const count = (n: number) => n.toLocaleString("en").replaceAll(",", "\u202f");

/** figure tells a value with its unit. */
export function figure(v: number | null | undefined, unit = ""): string {
  if (v === null || v === undefined) return "–";
  if (unit === "bytes") return bytes(Math.round(v));
  if (unit === "s") return v < 1e-3 ? (v * 1e6).toFixed(0) + " µs" : v < 1 ? (v * 1e3).toFixed(v < 0.1 ? 1 : 0) + " ms" : v < 120 ? v.toFixed(1) + " s" : span(v);
  const n = Number.isInteger(v) ? count(v) : v < 10 ? v.toFixed(2) : v < 100 ? v.toFixed(1) : count(Math.round(v));
  return unit === "1/s" ? n + "/s" : n;
}

export const plural = (n: number, one: string, many = one + "s") => `${count(n)} ${n === 1 ? one : many}`;
