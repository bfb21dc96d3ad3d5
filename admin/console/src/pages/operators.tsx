import { useState } from "preact/hooks";
import { ActDialog, myPasskeys } from "../act";
import type { Made } from "../act";
import { call, may, mayPropose, page } from "../api";
import type { Credential, Link, MadeLink, Operator, Session } from "../generated";
import { myRoles, session, signOut } from "../session";
import { ActButton, Command, Dialog, Empty, Facts, Form, Id, Input, Load, Page, Section, State, Table, Text, Time, useList, useLoad } from "../ui";
import { roleMeans } from "../words";


type Asked = { is: "add" | "passkey" } | { is: "roles" | "remove"; o: Operator } | { is: "credential"; o: Operator; c: Credential } | { is: "needed" | "hardware" };

export function Operators() {
  const mine = myRoles();
  const s = session.get();
  const people = may(mine, "GET /v1/operators");
  const list = useList((after, signal) => page("GET /v1/operators", { query: { after, limit: 50 }, signal }), [], people ? ["change", "proposal"] : []);
  const rules = useLoad(async (signal) => may(mine, "GET /v1/approvals") ? call("GET /v1/approvals", { signal }) : undefined, [], ["change"]);
  const [asked, setAsked] = useState<Asked | null>(null);
  const close = () => setAsked(null);
  return <Page title="Operators" lead="People, what they may do, and who is signed in." actions={<>
    {may(mine, "POST /v1/links") && <button type="button" class="primary" onClick={() => setAsked({ is: "add" })}>Link for a passkey…</button>}
    {mayPropose(mine, "approvals needed") && <button type="button" onClick={() => setAsked({ is: "needed" })}>Approvals needed…</button>}
    {rules.data && mayPropose(mine, "approvals hardware") && <button type="button" onClick={() => setAsked({ is: "hardware" })}>{rules.data.hardware ? "Allow all keys…" : "Hardware keys only…"}</button>}
  </>}>
    {s.is === "in" && <Section title="You">
      <Facts of={[["Name", <Text>{s.me.operator.name}</Text>], ["Roles", s.me.operator.roles.join(", ")], ["Passkeys here", String(myPasskeys().length)], ["Session ends", <Time s={s.me.session.expires} />]]} />
    </Section>}
    {people && <Section title="People">
      <Load of={list}>{() => <Table name="Operators" rows={list.items} id={(o) => o.name} more={list.more} loading={list.loadingMore} empty={<Empty title="Nobody is enrolled." />} columns={[
        { head: "Name", cell: (o) => <strong><Text>{o.name}</Text></strong> },
        { head: "Roles", cell: (o) => o.roles.map((r, i) => <span key={r} title={roleMeans[r]}>{i ? ", " : ""}{r}</span>) },
        { head: "Credentials", cell: (o) => o.credentials.map((c) => <div key={c.id}><span class="quiet">{c.kind}</span> <Id of="credential">{c.id}</Id>
          {mayPropose(mine, "credential remove") && o.credentials.length > 1 && <button type="button" class="link" onClick={() => setAsked({ is: "credential", o, c })}>Remove…</button>}</div>) },
        { head: "Since", quiet: true, cell: (o) => <Time s={o.added} /> },
        ...(mayPropose(mine, "operator roles") ? [{ head: "Change", cell: (o: Operator) => <div class="actions">
          <button type="button" onClick={() => setAsked({ is: "roles", o })}>Roles…</button>
          <button type="button" class="danger" onClick={() => setAsked({ is: "remove", o })}>Remove…</button></div> }] : []),
      ]} />}</Load>
    </Section>}
    {rules.data && <Section title="Approval">
      <Facts of={[
        ["Approvals an act needs", String(rules.data.needed)], ["Approvers", <Text>{rules.data.approvers.join(", ")}</Text>],
        ["Can it be reached?", rules.data.approvers.length < rules.data.needed ? <State tone="crit">no</State> : rules.data.approvers.length === rules.data.needed ? <State tone="warn">only if nobody is missing</State> : <State tone="ok">yes</State>],
      ]} />
      {rules.data.warning && <p class="notice warn"><State tone="warn"><Text>{rules.data.warning}</Text></State></p>}
    </Section>}
    {may(mine, "GET /v1/links") && <Links />}
    <Sessions />
    {asked?.is === "add" && <NewLink close={close} />}
    {asked?.is === "roles" && <Roles o={asked.o} close={close} done={list.reload} />}
    {asked?.is === "remove" && <ActDialog title={`Remove ${asked.o.name}`} name={asked.o.name} close={close} done={list.reload} loss="The operator’s sessions end, and open proposals of the operator too. The credentials are worth nothing afterwards."
      make={() => ({ act: "operator remove", parameters: { name: asked.o.name } })} />}
    {asked?.is === "credential" && <ActDialog title={`Remove a credential of ${asked.o.name}`} name={asked.o.name} close={close} done={list.reload} loss={`${asked.o.name} can’t sign in or approve with it any more.`}
      make={() => ({ act: "credential remove", parameters: { name: asked.o.name, id: asked.c.id } })} />}
    {asked?.is === "hardware" && <ActDialog title={rules.data?.hardware ? "Approvals by all keys" : "Approvals by hardware keys only"} close={close} done={rules.reload} make={() => ({ act: "approvals hardware", parameters: { required: rules.data?.hardware ? "no" : "yes" } })}>
      <p>{rules.data?.hardware ? "SSH keys in a file would count for approvals again." : "From then on only passkeys count, and FIDO keys that ask for their PIN at each signature. Approvals by other keys do not count any more, also for open proposals."}</p>
    </ActDialog>}
    {asked?.is === "needed" && <Needed now={rules.data?.needed ?? 1} close={close} done={rules.reload} />}
  </Page>;
}

function Needed({ now, close, done }: { now: number; close: () => void; done: () => void }) {
  const [n, setN] = useState(String(now));
  return <ActDialog title="Approvals that an act needs" close={close} done={done} can={/^[1-9]\d*$/.test(n) && Number(n) !== now} make={() => ({ act: "approvals needed", parameters: { needed: n } })}>
    <Input label="Approvers that must sign" value={n} set={setN} inputMode="numeric" required help={`Now ${now}. From the moment of the change, open proposals need as many, too.`} />
  </ActDialog>;
}

const allRoles = ["administrator", "operator", "auditor", "approver", "backup", "metrics"];

function RoleBoxes({ value, set }: { value: string[]; set: (v: string[]) => void }) {
  return <fieldset><legend>Roles</legend>{allRoles.map((r) => <label key={r}><input type="checkbox" checked={value.includes(r)} onChange={(e) => set(e.currentTarget.checked ? [...value, r] : value.filter((x) => x !== r))} /><span>{r} <span class="quiet">{roleMeans[r]}</span></span></label>)}</fieldset>;
}

const ordered = (roles: string[]) => allRoles.filter((r) => roles.includes(r)).join(",");

function Roles({ o, close, done }: { o: Operator; close: () => void; done: () => void }) {
  const [roles, setRoles] = useState(o.roles);
  return <ActDialog title={`Roles of ${o.name}`} close={close} done={done} can={roles.length > 0} make={() => ({ act: "operator roles", parameters: { name: o.name, roles: ordered(roles) } })}>
    <RoleBoxes value={roles} set={setRoles} />
    <p class="help">The operator’s sessions end with the change.</p>
  </ActDialog>;
}

function NewLink({ close }: { close: () => void }) {
  const [name, setName] = useState("");
  const [fresh, setFresh] = useState("new");
  const [roles, setRoles] = useState<string[]>(["operator"]);
  const [made, setMade] = useState<MadeLink | null>(null);
  return <Dialog title="A link for a passkey" close={close}>
    {made ? <>
      <p><State tone="ok">The link works once, until <Time s={made.expires} />. It is shown only here.</State></p>
      <Command of="link">{made.url}</Command>
      <p>Send it to <strong>{made.operator}</strong> by a way that nobody else reads. The passkey that it makes comes to the list of links; there you propose it. Compare its id with the person first.</p>
      <div class="buttons"><button type="button" onClick={close}>Close</button></div>
    </> : <Form submit="Make the link" cancel={close} can={!!name && (fresh === "known" || roles.length > 0)} act={async () => {
      setMade(await call("POST /v1/links", { body: { operator: name, ...(fresh === "new" ? { roles } : {}) } }));
    }}>
      <fieldset><legend>For</legend>
        <label><input type="radio" name="for" checked={fresh === "new"} onChange={() => setFresh("new")} />a new person</label>
        <label><input type="radio" name="for" checked={fresh === "known"} onChange={() => setFresh("known")} />an operator who gets one more passkey</label>
      </fieldset>
      <Input label="Name" value={name} set={setName} required maxLength={64} help="Lower-case letters, digits and hyphens." />
      {fresh === "new" && <RoleBoxes value={roles} set={setRoles} />}
    </Form>}
  </Dialog>;
}

function Links() {
  const list = useLoad((signal) => call("GET /v1/links", { signal }), []);
  const mine = myRoles();
  const [proposing, setProposing] = useState<Link | null>(null);
  return <Section title="Links" note="They end with the daemon, and after a day." actions={<button type="button" onClick={list.reload}>Look again</button>}>
    <Load of={list}>{(all) => <Table name="Links" rows={all} id={(l) => l.id} empty={<Empty title="There is no link.">“Link for a passkey” makes one, for a person who has no credential here yet.</Empty>} columns={[
      { head: "For", cell: (l) => <><strong><Text>{l.operator}</Text></strong> <span class="quiet">{l.roles.join(", ")}</span></> },
      { head: "State", cell: (l) => l.used ? <State tone="info">passkey made <Time s={l.used} ago /></State> : <State tone="off">not opened to the end</State> },
      { head: "Passkey", cell: (l) => l.credential ? <Id of="credential id" whole>{l.credential.id}</Id> : null },
      { head: "Ends", quiet: true, cell: (l) => <Time s={l.expires} ago /> },
      { head: "", cell: (l) => <div class="actions">
        {l.credential && !l.first && mayPropose(mine, l.roles.length ? "operator add" : "credential add") && <button type="button" class="primary" onClick={() => setProposing(l)}>Propose…</button>}
        <ActButton act={async () => { await call("DELETE /v1/links/{id}", { path: { id: l.id } }); list.reload(); }}>{l.used ? "Forget" : "Make worthless"}</ActButton></div> },
    ]} />}</Load>
    {proposing && <ActDialog title={`Enrol ${proposing.operator}`} close={() => setProposing(null)} done={list.reload} make={(): Made => {
      const credential = JSON.stringify(proposing.credential);
      return proposing.roles.length ? { act: "operator add", parameters: { name: proposing.operator, roles: ordered(proposing.roles), credential } }
        : { act: "credential add", parameters: { name: proposing.operator, credential } };
    }}>
      <p>Ask <strong><Text>{proposing.operator}</Text></strong> for the id that the page of the link shows, by a way on which you know each other. It must be:</p>
      <p><Id of="credential id" whole>{proposing.credential?.id ?? ""}</Id></p>
    </ActDialog>}
  </Section>;
}

function Sessions() {
  const list = useList((after, signal) => page("GET /v1/sessions", { query: { after, limit: 50 }, signal }), [], ["change"]);
  return <Section title="Sessions" note={myRoles().includes("administrator") ? "Of everybody." : "Your own."}>
    <Load of={list}>{() => <Table name="Sessions" rows={list.items} id={(x) => x.id} more={list.more} loading={list.loadingMore} empty={<Empty title="Nobody is signed in." />} columns={[
      { head: "Operator", cell: (x) => <><Text>{x.operator}</Text>{x.current && <span class="quiet"> · this one</span>}</> },
      { head: "From", cell: (x) => <><Text>{x.source}</Text> <span class="quiet">{x.channel}</span></> },
      { head: "Begun", cell: (x) => <Time s={x.begun} ago /> },
      { head: "Last used", cell: (x) => <Time s={x.last_used} ago /> },
      { head: "Ends", quiet: true, cell: (x) => <Time s={x.expires} ago /> },
      { head: "", cell: (x: Session) => <ActButton act={async () => {
        if (x.current) return signOut();
        await call("DELETE /v1/sessions/{id}", { path: { id: x.id } });
        list.reload();
      }}>End</ActButton> },
    ]} />}</Load>
  </Section>;
}

