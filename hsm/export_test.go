package hsm

// LogOut ends the login of all sessions of the process behind the store's back.
func (s *Store) LogOut() {
	s.using.RLock()
	defer s.using.RUnlock()
	s.module.Logout(s.loginSession())
}

// IdleSlots returns how many of the operations that may be in flight are not.
func (s *Store) IdleSlots() int { return len(s.slots) }
