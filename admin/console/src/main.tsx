// The console: the frame with the names of the pages and the state on top, and the page of the
// present address.
import { Component, render } from "preact";
import type { ComponentChildren } from "preact";
import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import { may } from "./api";
import type { Operation } from "./api";
import type { Me } from "./generated";
import { connected, follow, health } from "./live";
import * as router from "./router";
import { route } from "./router";
import type { Address } from "./router";
import { Search } from "./search";
import { begin, session, signOut } from "./session";
import { Enrol, SignIn, takeFragment } from "./signin";
import { useStore } from "./store";
import { Empty, Mark, Page, Problem, Shape, State, Time, Waiting } from "./ui";
import { sentence } from "./words";
import { Alerts, Kind } from "./pages/alerts";
import { Approval, Approvals } from "./pages/approvals";
import { AuditEvent, Audit } from "./pages/audit";
import { Figures } from "./pages/figures";
import { Key, Keys } from "./pages/keys";
import { Operators } from "./pages/operators";
import { Overview } from "./pages/overview";
import { Peer, Peers } from "./pages/peers";
import { Policy } from "./pages/policy";
import { PolicyEdit } from "./pages/policy-edit";
import { Retention } from "./pages/retention";

type Place = {
  at: string;
  name: string;
  group: string;
  /** needs is the operation without which the page would be empty. */
  needs: Operation;
  show: (a: Address) => ComponentChildren;
};

/** places are the pages, in the order of the frame. */
const places: Place[] = [
  { at: "", name: "Overview", group: "Now", needs: "GET /v1/health/state", show: () => <Overview /> },
  { at: "alerts", name: "Alerts", group: "Now", needs: "GET /v1/alerts", show: ({ path }) => path[1] ? <Kind code={path[1]} key={path[1]} /> : <Alerts /> },
  { at: "figures", name: "Figures", group: "Now", needs: "GET /v1/history", show: () => <Figures /> },
  { at: "keys", name: "Keys", group: "What signs", needs: "GET /v1/keys", show: ({ path }) => path[1] ? <Key name={path[1]} key={path[1]} /> : <Keys /> },
  { at: "peers", name: "Peers", group: "What signs", needs: "GET /v1/peers", show: ({ path }) => path[1] ? <Peer name={path[1]} key={path[1]} /> : <Peers /> },
  { at: "policy", name: "Policy", group: "What signs", needs: "GET /v1/policies", show: ({ path }) => path[1] === "edit" ? <PolicyEdit /> : <Policy version={path[1]} /> },
  { at: "approvals", name: "Approvals", group: "Who decides", needs: "GET /v1/proposals", show: ({ path }) => path[1] ? <Approval id={Number(path[1])} key={path[1]} /> : <Approvals /> },
  { at: "operators", name: "Operators", group: "Who decides", needs: "GET /v1/sessions", show: () => <Operators /> },
  { at: "audit", name: "Audit log", group: "The record", needs: "GET /v1/events", show: ({ path }) => path[1] ? <AuditEvent index={Number(path[1])} key={path[1]} /> : <Audit /> },
  { at: "retention", name: "Retention", group: "The record", needs: "GET /v1/retention", show: () => <Retention /> },
  { at: "receipts", name: "Receipts", group: "The record", needs: "GET /v1/receipts", show: () => <Retention receipts /> },
];

/** Boundary shows the failure of a page in its place: the frame stays. */
class Boundary extends Component<{ of: string; children: ComponentChildren }, { error: unknown; of: string }> {
  state = { error: undefined as unknown, of: "" };
  componentDidCatch(error: unknown) { this.setState({ error, of: this.props.of }); }
  render() {
    const { error, of } = this.state;
    return error !== undefined && of === this.props.of ? <Problem error={error} again={() => this.setState({ error: undefined })} /> : this.props.children;
  }
}

function App() {
  const s = useStore(session);
  const a = useStore(route);
  if (a.path[0] === "enrol") return <Enrol />;
  if (s.is === "unknown") return <Waiting of="Opening the console" />;
  if (s.is === "out") return <SignIn />;
  return <Frame me={s.me} address={a} />;
}

function Frame({ me, address }: { me: Me; address: Address }) {
  const [open, setOpen] = useState(false);
  const [searching, setSearching] = useState(false);
  const main = useRef<HTMLElement>(null);
  const roles = me.operator.roles;
  const mine = places.filter((p) => may(roles, p.needs));
  const place = places.find((p) => p.at === (address.path[0] ?? ""));
  const where = address.path.join("/");
  useEffect(follow, [me.session.id]);
  useEffect(() => {
    const keys = (e: KeyboardEvent) => {
      const t = e.target as HTMLElement;
      if (e.key !== "/" || e.ctrlKey || e.metaKey || e.altKey || t.closest("input, textarea, select, dialog, [contenteditable]")) return;
      e.preventDefault();
      setSearching(true);
    };
    addEventListener("keydown", keys);
    return () => removeEventListener("keydown", keys);
  }, []);
  const first = useRef(true);
  useLayoutEffect(() => { // with the page: a key pressed at once begins at its heading
    setOpen(false);
    if (first.current) { first.current = false; return; }
    main.current?.querySelector("h1")?.focus({ preventScroll: true }); // a screen reader hears the new page
  }, [where]);
  let group = "";
  return <div class="frame">
    <a class="skip" href="#main" onClick={(e) => { e.preventDefault(); main.current?.focus(); }}>To the content</a>
    <div class={open ? "side open" : "side"} id="side">
      <a class="brand" href="/"><Mark />Countersign</a>
      <nav aria-label="Pages"><ul>{mine.map((p) => {
        const head = p.group !== group && <li class="group" aria-hidden="true">{group = p.group}</li>;
        return <>{head}<li key={p.at}><a href={"/" + p.at} aria-current={p === place ? "page" : undefined}>{p.name}<Tally of={p.at} /></a></li></>;
      })}</ul></nav>
      <div class="who">
        <div><strong>{me.operator.name}</strong><br /><span class="quiet">{roles.join(", ")}</span></div>
        <div class="quiet">Session ends <Time s={me.session.expires} ago /></div>
        <button type="button" onClick={() => void signOut()}>Sign out</button>
      </div>
    </div>
    <header class="top">
      <button type="button" class="menu" aria-expanded={open} aria-controls="side" onClick={() => setOpen(!open)}>Menu</button>
      <StateLine told={place?.at !== ""} />
      <button type="button" onClick={() => setSearching(true)}>Search <kbd>/</kbd></button>
    </header>
    <main id="main" ref={main} tabIndex={-1}>
      <Boundary of={where}>{!place ? <Nowhere /> : !may(roles, place.needs) ? <NotYours name={place.name} /> : place.show(address)}</Boundary>
    </main>
    {searching && <Search close={() => setSearching(false)} pages={mine.map((p) => ({ name: p.name, to: "/" + p.at }))} />}
  </div>;
}

/** Tally is what waits on a page. */
function Tally({ of }: { of: string }) {
  const h = useStore(health);
  const n = of === "alerts" ? h?.alerts?.length ?? 0 : 0;
  return n ? <span class="tally"><Shape tone={h!.alerts!.some((a) => a.level === "critical") ? "crit" : "warn"} /> {n}</span> : null;
}

/** StateLine is the line on top of each page. The overview tells the state itself. */
function StateLine({ told }: { told: boolean }) {
  const h = useStore(health), live = useStore(connected);
  const s = h && sentence(h);
  return <div class="line" role="status">
    {told && (s ? <State tone={s.tone}>{s.text}</State> : <span class="quiet">Looking…</span>)}
    {h && !live && <span class="quiet"> <State tone="warn">Not live: trying to connect again.</State></span>}
  </div>;
}

function Nowhere() {
  return <Page title="There is no such page"><Empty title="The address is not one of the console."><p>Press <kbd>/</kbd> to search, or choose a page at the side.</p></Empty></Page>;
}

function NotYours({ name }: { name: string }) {
  return <Page title={name}><Empty title="Your roles do not include this page."><p>An administrator gives roles: Operators.</p></Empty></Page>;
}

takeFragment();
router.begin();
void begin();
render(<App />, document.body);
