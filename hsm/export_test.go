package hsm

// LogOut ends the login of all sessions of the process without the store's knowledge.
func (s *Store) LogOut() {
	s.moduleMu.RLock()
	defer s.moduleMu.RUnlock()
	s.module.Logout(s.loginSession())
}

// IdleSessions returns the number of sessions in the pool.
func (s *Store) IdleSessions() int { return len(s.sessions) }
