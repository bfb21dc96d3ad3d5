package worker

import (
	"errors"
	"fmt"

	"countersign/internal/keystore"
)

// A worker asks the pool for permission before each login to the token. Two rules follow from that
// request. First, one worker at a time logs in: SoftHSM writes its token file at each login, and a
// process that initialises the module at that moment does not find the token. Second, after a
// refused PIN no worker logs in until Retry, or until the PIN file is another: further attempts
// with a wrong PIN would lock the token. The refusal outlives the process, see refusal.go.

// loginGate grants logins. Pool is the gate of its workers.
type loginGate interface {
	requestLogin(p *process, id uint64)     // a worker asks; the answer is a loginReply frame with the id
	loginDone(p *process, refusedPIN error) // the login has ended
}

// requestLogin grants one login at a time, and none after a refused PIN.
func (p *Pool) requestLogin(proc *process, id uint64) {
	select {
	case p.loginLock <- struct{}{}:
	case <-proc.dead:
		return
	case <-p.closed:
		return
	}
	grant := p.grant()
	if grant == denied {
		<-p.loginLock
		proc.asking.Store(false)
		proc.pipe.send(id, loginReply, []byte{byte(grant)})
		return
	}
	ended := proc.beginLogin()
	proc.pipe.send(id, loginReply, []byte{byte(grant)})
	select {
	case <-ended:
	case <-proc.dead: // the result is unknown, but no refused PIN: the worker reports a refusal before its end
	}
	<-p.loginLock
}

// grant is the body of a loginReply frame.
type grant byte

const (
	denied         grant = 0
	granted        grant = 1
	grantedLastTry grant = 2 // also with one try left until the token locks: an operator has said so
)

// grant decides about a login. An operator's permission for the last try is for one login.
func (p *Pool) grant() grant {
	tried := p.refusal.identify() // before the worker reads the file
	remembered := p.refusal.remembered(tried)
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.authErr == nil && remembered != nil {
		p.authErr = remembered
		p.refusal.refuse(tried)
	}
	switch {
	case p.authErr != nil:
		return denied
	case p.lastTry:
		p.lastTry = false
		p.refusal.tried = tried
		return grantedLastTry
	}
	p.refusal.tried = tried
	return granted
}

func (p *Pool) loginDone(proc *process, refusedPIN error) {
	if refusedPIN != nil {
		p.mu.Lock()
		retries := p.retries
		p.mu.Unlock()
		p.stopLogins(refusedPIN, retries)
	}
	proc.endLogin()
}

// stopLogins forbids logins until Retry. retries is the number of Retry calls at the time of the
// login with the refused PIN: a refusal from before the last Retry is out of date and ignored. A
// PIN that was not tried (keystore.ErrLastTry) forbids nothing: the next start of a worker looks
// again, without a login. The result is the refusal in force: a worker that was denied a login does
// not know the reason.
func (p *Pool) stopLogins(err error, retries int) error {
	if errors.Is(err, keystore.ErrLastTry) {
		return err
	}
	p.mu.Lock()
	first := p.authErr == nil && p.retries == retries
	if first {
		p.authErr = err
		if unkept := p.refusal.keep(err); unkept != nil {
			p.authErr = fmt.Errorf("%w; a restart would try the PIN again, since the refusal can't be written: %w",
				err, unkept)
		}
	}
	report := first && p.opened
	if p.authErr != nil {
		err = p.authErr
	}
	p.mu.Unlock()
	if report {
		p.config.Log.Error("the token has refused the PIN; correct the PIN file, or run countersign admin token retry",
			"token", p.config.Name, "err", err)
	}
	return err
}

// barred is the refusal of the PIN that keeps workers from starting. The caller holds mu.
func (p *Pool) barred() error {
	if p.config.PINPerKey {
		return nil
	}
	return p.authErr
}

// Retry permits logins again, one of them on the last try, and ends all backoff pauses at once.
func (p *Pool) Retry() {
	if err := p.forgetRefusal(true); err != nil {
		p.config.Log.Error("the refusal of a PIN is still remembered: remove its file",
			"token", p.config.Name, "err", err)
	}
}

// watchPINFile permits logins again when the PIN file is another than the refused one, and the same
// at two probes: the file may be written in steps.
func (p *Pool) watchPINFile() {
	p.mu.Lock()
	refused := p.authErr != nil && p.refusal.pinFile != ""
	p.mu.Unlock()
	if !refused {
		return
	}
	now := p.refusal.identify()
	p.mu.Lock()
	changed := p.authErr != nil && p.refusal.changed(now)
	p.mu.Unlock()
	if changed {
		p.config.Log.Info("the PIN file has changed: a login is tried", "token", p.config.Name)
		if err := p.forgetRefusal(false); err != nil {
			p.config.Log.Error("the refusal of a PIN is still remembered", "token", p.config.Name, "err", err)
		}
	}
}

// forgetRefusal permits logins again, on the last try only by the word of an operator.
func (p *Pool) forgetRefusal(operator bool) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	err := p.refusal.forget()
	p.authErr = nil
	p.lastTry = operator
	p.retries++
	close(p.retry)
	p.retry = make(chan struct{})
	return err
}

// beginLogin marks a login as permitted. endLogin closes the channel.
func (p *process) beginLogin() (ended <-chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.login = make(chan struct{})
	return p.login
}

func (p *process) endLogin() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.asking.Store(false)
	close(p.login)
	p.login = nil
}

// loggingIn reports a permitted login without an end yet.
func (p *process) loggingIn() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.login != nil
}
