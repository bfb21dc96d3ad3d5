// Pages without a session: sign in, and make a passkey by a link that works once.
import { useEffect, useState } from "preact/hooks";
import { call } from "./api";
import type { OpenedLink } from "./generated";
import { registration } from "./passkey";
import { go } from "./router";
import { session, signIn } from "./session";
import { Store, useStore } from "./store";
import { Command, Facts, Form, Id, Input, Load, Mark, Problem, State, Text, Time, useLoad } from "./ui";
import { sentence } from "./words";

function Alone({ title, children }: { title: string; children: preact.ComponentChildren }) {
  useEffect(() => { document.title = title + " · Countersign"; }, [title]);
  return <div class="alone"><main class="card"><div class="brand"><Mark />Countersign</div><h1>{title}</h1>{children}</main></div>;
}

export function SignIn() {
  const s = session.get();
  const [name, setName] = useState(localStorage.getItem("operator") ?? "");
  const state = useLoad((signal) => call("GET /v1/health/state", { signal }), []);
  if (state.data?.state === "uninitialised") return <First />;
  const why = s.is === "out" ? s.why : "";
  return <Alone title="Sign in">
    {why === "signed_out" && <p class="notice ok" role="status">You have signed out, in all tabs.</p>}
    {why === "ended" && <p class="notice" role="status">The session is over: it was ended, was not used for 15 minutes, or had lasted an hour.</p>}
    <Form submit="Sign in with a passkey" act={() => signIn(name.trim())}>
      <Input label="Operator" value={name} set={setName} required name="username" autocomplete="username webauthn" autofocus maxLength={64} />
    </Form>
    {state.error !== undefined && <Problem error={state.error} again={state.reload} />}
    {state.data && <p class="quiet"><State tone={sentence(state.data).tone}>{state.data.state === "degraded" ? "Something needs a look: sign in to see what." : sentence(state.data).text}</State></p>}
    <p class="help">You have no passkey here? An administrator sends you a link that makes one: Operators, then “Link for a passkey”. With an SSH key, use the command <code>countersign admin</code>.</p>
  </Alone>;
}

function First() {
  return <Alone title="A new appliance">
    <p>Nobody is enrolled yet. As root on this machine, make the link for the first administrator:</p>
    <Command>countersign admin operator first NAME --link</Command>
    <p class="help">Replace NAME by your name, for example <code>ann</code>. Open the link in this browser within 30 minutes; it works once.</p>
  </Alone>;
}

/** opened is the link's secret, read once and removed from the address. */
const opened = new Store({ secret: "", times: 0 });
export function takeFragment() {
  const take = () => {
    if (location.pathname !== "/enrol" || location.hash.length < 2) return;
    opened.set({ secret: location.hash.slice(1), times: opened.get().times + 1 });
    history.replaceState(null, "", "/enrol");
  };
  take();
  addEventListener("hashchange", take);
}

export function Enrol() {
  const { secret, times } = useStore(opened);
  return <EnrolBy fragment={secret} key={times} />;
}

function EnrolBy({ fragment }: { fragment: string }) {
  const link = useLoad(async () => fragment ? call("POST /v1/links/open", { body: { secret: fragment } }) : undefined, [fragment]);
  const [done, setDone] = useState<{ operator: string; first: boolean; id: string } | null>(null);
  if (done) {
    return <Alone title={done.first ? `Welcome, ${done.operator}` : "Your passkey is made"}>
      {done.first ? <>
        <p><State tone="ok">You are the first administrator.</State></p>
        <Form submit="Sign in with the passkey" act={async () => { await signIn(done.operator); go("/"); }} />
      </> : <>
        <p><State tone="info">It is not enrolled yet: approvers must agree first.</State></p>
        <p>Tell the administrator this id, by a way on which you know each other. It must be the one on the administrator's page:</p>
        <p><Id of="credential id" whole>{done.id}</Id></p>
        <p class="help">When it is approved, sign in at <a href="/">this appliance</a> as <strong>{done.operator}</strong>.</p>
      </>}
    </Alone>;
  }
  if (!fragment) {
    return <Alone title="The link is not whole"><p>Open the address that you were sent, with all that is behind the #. If you have opened it before in this tab, open it again: the secret is removed from the address at once.</p></Alone>;
  }
  return <Alone title="Make your passkey">
    <Load of={link}>{(l: OpenedLink | undefined) => l && <>
      <Facts of={[
        ["Operator", <strong><Text>{l.operator}</Text></strong>],
        ["Appliance", <code><Text>{l.appliance}</Text></code>],
        ["Roles", l.roles.length ? l.roles.join(", ") : "as now"],
        ["Link made by", <Text>{l.by}</Text>],
        ["Works until", <Time s={l.expires} />],
      ]} />
      <p>A passkey is a key pair on this device, or on a security key. The private key stays there; you confirm each use by a finger, a face or a PIN.</p>
      <Form submit="Make the passkey" act={async () => {
        const fresh = await call("POST /v1/links/open", { body: { secret: fragment } });
        const credential = await registration(fresh.public_key);
        const used = await call("POST /v1/links/use", { body: { secret: fragment, challenge: fresh.challenge, credential } });
        localStorage.setItem("operator", used.operator);
        setDone({ operator: used.operator, first: used.first, id: used.credential?.id ?? "" });
      }} />
    </>}</Load>
  </Alone>;
}
