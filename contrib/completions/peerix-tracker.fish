# Made of what --help says by tests/manual.rs.
complete -c peerix-tracker -f
complete -c peerix-tracker -l port -x -d 'TCP port [default: 12305]'
complete -c peerix-tracker -l host -x -d 'address or name of this machine to listen on, repeatable; [::] adds IPv6 [default: 0.0.0.0]'
complete -c peerix-tracker -l db-path -r -F -d 'database of peer IDs, transfers and reputation, made if there is none; that of the Python tracker is taken over [default: ./peerix-tracker.db]'
complete -c peerix-tracker -l filter-memory -x -d 'memory for the filters of peers, from 16; nodes are told to make smaller ones when it is half used [default: 1024]'
complete -c peerix-tracker -l proxy -x -d 'address of a reverse proxy in front of the tracker, repeatable: the last address in its X-Forwarded-For is the client\'s'
complete -c peerix-tracker -s v -l verbose -d 'log what each request does; RUST_LOG is read as well'
complete -c peerix-tracker -s h -l help -d ''
complete -c peerix-tracker -s V -l version -d ''
