package flood

func frameAttacks() []attack { return nil }
func udpAttacks() []attack   { return nil }
func dnsAttacks() []attack   { return nil }
func portAttacks() []attack  { return nil }
