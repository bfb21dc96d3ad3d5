package worker

// A worker asks the pool for permission before each login to the token. Two rules follow from that
// request. First, one worker at a time logs in: SoftHSM writes its token file at each login, and a
// process that initialises the module at that moment does not find the token. Second, after a
// refused PIN no worker logs in until Retry: further attempts with a wrong PIN would lock the
// token.

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
	p.mu.Lock()
	granted := p.authErr == nil
	p.mu.Unlock()
	if !granted {
		<-p.loginLock
		proc.asking.Store(false)
		proc.pipe.send(id, loginReply, []byte{0})
		return
	}
	ended := proc.beginLogin()
	proc.pipe.send(id, loginReply, []byte{1})
	select {
	case <-ended:
	case <-proc.dead: // the result is unknown, but no refused PIN: the worker reports a refusal before its end
	}
	<-p.loginLock
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
// login with the refused PIN: a refusal from before the last Retry is out of date and ignored.
func (p *Pool) stopLogins(err error, retries int) {
	p.mu.Lock()
	first := p.authErr == nil && p.retries == retries
	if first {
		p.authErr = err
	}
	report := first && p.opened
	p.mu.Unlock()
	if report {
		p.config.Log.Error("the token has refused the PIN; correct the PIN, then run countersign admin token retry",
			"token", p.config.Name, "err", err)
	}
}

// Retry permits logins again and ends all backoff pauses at once.
func (p *Pool) Retry() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.authErr = nil
	p.retries++
	close(p.retry)
	p.retry = make(chan struct{})
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
