package worker

import ()

// gate decides about logins.
type gate interface {
	ask(p *process, id uint64)         // a worker asks; the answer goes to it
	done(p *process, refusedPIN error) // its login has ended
}

func (p *Pool) Retry() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.authFail = nil
	p.retries++
	close(p.retry)
	p.retry = make(chan struct{})
}

// ask lets one worker at a time log in, and none after a PIN was refused.
func (p *Pool) ask(proc *process, id uint64) {
	select {
	case p.login <- struct{}{}:
	case <-proc.dead:
		return
	case <-p.closed:
		return
	}
	p.mu.Lock()
	may := p.authFail == nil
	p.mu.Unlock()
	if !may {
		<-p.login
		proc.asking.Store(false)
		proc.pipe.send(id, mayLogin, []byte{0})
		return
	}
	ended := proc.beginLogin()
	proc.pipe.send(id, mayLogin, []byte{1})
	select {
	case <-ended:
	case <-proc.dead: // nobody knows what came of it: a refused PIN would have been told first
	}
	<-p.login
}

func (p *Pool) done(proc *process, refusedPIN error) {
	if refusedPIN != nil {
		p.mu.Lock()
		retries := p.retries
		p.mu.Unlock()
		p.refusedPIN(refusedPIN, retries)
	}
	proc.endLogin()
}

// refusedPIN ends all logins until Retry, unless there has been one since whoever says so knew of the last.
func (p *Pool) refusedPIN(err error, retries int) {
	p.mu.Lock()
	news := p.authFail == nil && p.retries == retries
	if news {
		p.authFail = err
	}
	news = news && p.open
	p.mu.Unlock()
	if news {
		p.config.Log.Error("the token has refused the PIN; nothing logs in to it until an operator says so", "token", p.config.Name, "err", err)
	}
}

// beginLogin and endLogin bracket a login.
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

func (p *process) loggingIn() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.login != nil
}
