// An act that needs approval: the form, the proposal, the exact text, the signature, the outcome.
import type { ComponentChildren } from "preact";
import { useState } from "preact/hooks";
import { Refused, call, parameters } from "./api";
import { hex, sha256, utf8 } from "./bytes";
import type { Proposal } from "./generated";
import { signText } from "./passkey";
import { link } from "./router";
import { myRoles, session } from "./session";
import { Dialog, Form, Input, State, Text, plural } from "./ui";
import { proposalTone } from "./words";

export type Made = { act: string; parameters: Record<string, string>; content?: string | undefined };

/** ActDialog proposes an act, and has the proposer sign at once where the proposer may approve. */
export function ActDialog({ title, loss, name, submit = "Propose", can = true, make, close, done, children }: {
  title: string; submit?: string; can?: boolean;
  /** loss says what will be lost; name is then typed to go on. */
  loss?: ComponentChildren; name?: string | undefined;
  make: () => Made; close: () => void; done?: (p: Proposal) => void; children?: ComponentChildren;
}) {
  const [proposal, setProposal] = useState<Proposal | null>(null);
  const [typed, setTyped] = useState("");
  if (proposal) {
    return <Dialog title={title} close={close}>
      <Signing proposal={proposal} onChange={(p) => { setProposal(p); if (p.state !== "open") done?.(p); }} />
      <div class="buttons"><button type="button" onClick={close}>Close</button>
        <a href={link("approvals", proposal.id)} onClick={close}>Proposal {proposal.id}</a></div>
    </Dialog>;
  }
  return <Dialog title={title} close={close}>
    <Form submit={submit} danger={!!loss} cancel={close} can={can && (!name || typed === name)} act={async () => {
      const m = make();
      const p = await call("POST /v1/proposals", {
        body: { act: m.act, parameters: parameters(m.parameters), ...(m.content === undefined ? {} : { content: m.content }) },
      });
      await asks(p, m);
      setProposal(p);
    }}>
      {loss && <div class="loss"><State tone="warn">{loss}</State></div>}
      {children}
      {name && <Input label={`Type ${name} to go on`} value={typed} set={setTyped} required />}
    </Form>
  </Dialog>;
}

/** asks checks that the text to sign asks for what was proposed, in the name of who proposed it. A signature counts for ever. */
async function asks(p: Proposal, m: Made) {
  const wrong = (why: string) => new Refused("conflict", "The text is not what you proposed", `${why} Do not sign it; tell an auditor. Proposal ${p.id} is open.`);
  const lines = p.text.split("\n");
  const s = session.get();
  if (!lines.includes(`act: ${m.act}`)) throw wrong("It names another act.");
  if (s.is === "in" && !lines.includes(`proposed by: ${s.me.operator.name}`)) throw wrong("It names another proposer.");
  const said = Object.fromEntries(lines.filter((l) => l.startsWith("  ")).map((l) => [l.slice(2, l.indexOf(": ")), l.slice(l.indexOf(": ") + 2)]));
  for (const [name, value] of Object.entries(m.parameters)) {
    if (said[name] !== value) throw wrong(`It says ${name}: ${said[name] ?? "nothing"}.`);
    delete said[name];
  }
  for (const [name, value] of Object.entries(said)) {
    // The appliance adds the digest of a content, and of what the content replaces.
    const digest = m.content === undefined ? "" : hex(await sha256(utf8(m.content)));
    if (name !== "replaces" && !(name === "sha256" && value === digest)) throw wrong(`It says ${name}: ${value}, which you did not propose.`);
  }
}

/** myPasskeys returns the passkeys of who is signed in that this origin can use. */
export function myPasskeys(): string[] {
  const s = session.get();
  if (s.is !== "in") return [];
  return s.me.operator.credentials.filter((c) => c.kind === "passkey" && c.credential_id).map((c) => c.credential_id!);
}

/** Signing shows the exact text of a proposal, and signs it. */
export function Signing({ proposal: p, onChange }: { proposal: Proposal; onChange: (p: Proposal) => void }) {
  const s = session.get();
  const me = s.is === "in" ? s.me.operator.name : "";
  const mine = p.approvals.some((a) => a.operator === me);
  const counting = p.approvals.filter((a) => a.counts).length;
  const keys = myPasskeys();
  const can = p.state === "open" && myRoles().includes("approver") && !mine;
  return <>
    {p.warnings?.map((w) => <div class="notice warn" key={w}><State tone="warn"><Text>{w}</Text></State></div>)}
    <Outcome proposal={p} />
    {p.state === "open" && <>
      <div>
        <h3>What is signed</h3>
        <p class="help">These bytes, and nothing else. A signature of {me || "an approver"} over this text is an approval.</p>
      </div>
      <pre class="text" tabIndex={0} aria-label="The text that is signed"><Text lines>{p.text}</Text></pre>
    </>}
    {can && keys.length > 0 && <Form submit="Sign with passkey" act={async () => {
      const proof = await signText(p.text, keys);
      onChange(await call("POST /v1/proposals/{id}/approvals", { path: { id: p.id }, body: { proof } }));
    }}>
      <p>{counting + 1 >= p.required ? "Your signature is the last one that is needed: the act is carried out at once."
        : `Your signature is number ${counting + 1} of ${p.required}.`}</p>
    </Form>}
    {can && keys.length === 0 && <p class="notice">You have no passkey at this address. Sign with your SSH key: <code>countersign admin proposal approve {p.id}</code></p>}
    {p.state === "open" && mine && <p class="notice">You have signed. {plural(Math.max(0, p.required - counting), "more signature")} {p.required - counting === 1 ? "is" : "are"} needed.</p>}
    {p.state === "open" && !can && !mine && <p class="notice">Approvers sign it: {counting} of {p.required} have. Send them the address of this proposal.</p>}
  </>;
}

export function Outcome({ proposal: p }: { proposal: Proposal }) {
  const told: Record<string, string> = {
    open: "waits for approval", running: "is being carried out", done: "was carried out", failed: "was approved, and has failed",
    expired: "has expired", withdrawn: "was withdrawn", interrupted: "was interrupted by a restart: look whether it was carried out",
  };
  return <div class={"notice " + ({ done: "ok", failed: "crit", interrupted: "warn" }[p.state as string] ?? "")} role="status">
    <State tone={proposalTone[p.state] ?? "info"}>Proposal {p.id} <strong>{told[p.state]}</strong>.</State>
    {p.cause && <p><Text>{p.cause}</Text></p>}
  </div>;
}
