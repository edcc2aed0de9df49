# The NixOS module: `services.peerix` and `services.peerix.tracker`. Options, names, types and defaults of the original
# peerix, and a few for what it did not have. tests/module.rs evaluates it, `make vm-test` runs its units.
{
  config,
  lib,
  pkgs,
  utils,
  ...
}:
let
  inherit (lib)
    hasPrefix
    mkEnableOption
    mapAttrsToList
    mkDefault
    mkIf
    mkMerge
    mkOption
    mkPackageOption
    optional
    removePrefix
    types
    ;

  cfg = config.services.peerix;
  tracker = cfg.tracker;

  # `--flag=value`, so that a value that begins with a dash is no flag. Switches have none; lists give a flag each.
  flags =
    name: value:
    if value == null || value == false || value == "" then
      [ ]
    else if value == true then
      [ "--${name}" ]
    else
      map (one: "--${name}=${toString one}") (lib.toList value);
  commandLine =
    program: arguments:
    utils.escapeSystemdExecArgs ([ "${cfg.package}/bin/${program}" ] ++ arguments);

  urlAssertions =
    name:
    map (url: {
      assertion = builtins.match "https?://[^[:space:]]+" url != null;
      message = "services.peerix: ${name} (${url}) is no URL: it begins with http:// or https://.";
    }) (builtins.filter (url: url != "") (lib.toList (cfg.settings.${name} or [ ])));
  # A name, a colon and 32 bytes in base64; several are separated by spaces.
  isPublicKeys = keys: builtins.match "([^:[:space:]]+:[A-Za-z0-9+/]{43}=[[:space:]]*)+" keys != null;

  # A path in a setting that systemd takes to the end of the line.
  pathSetting = path: builtins.replaceStrings [ "%" ] [ "%%" ] (toString path);

  isInStore = path: hasPrefix "${builtins.storeDir}/" (toString path);

  # "nobody", the original's default, stands for nobody in particular: a user that exists while the service runs and
  # shares nothing with any other, and the group that goes with it.
  ownUser = toString cfg.user == "nobody";

  # A file beside the configuration has to go with the system; one that is named by a string is somewhere on it.
  publicKeyFile = if builtins.isPath cfg.publicKeyFile then "${cfg.publicKeyFile}" else cfg.publicKeyFile;

  # Those after `sign=` in the friends' lines.
  friendKeys =
    let
      parts = friend: builtins.filter builtins.isString (builtins.split "," friend);
    in
    builtins.concatMap (
      friend: map (removePrefix "sign=") (builtins.filter (hasPrefix "sign=") (parts friend))
    ) cfg.friends;

  # nix.conf has to name the key in the file, and the file is not read while this is evaluated: it may not be there yet.
  publicKeyDir = "/run/peerix-public-key";

  # Sockets are not restarted when their configuration changes, so that with other addresses it is another socket.
  socket =
    "peerix"
    + lib.optionalString (cfg.port != 12304) "-${toString cfg.port}"
    + lib.optionalString cfg.enableIPv6 "-ipv6";

  # What both programs do without. systemd-analyze security tells what each is worth.
  hardened = {
    # Root's powers, and ways to get them.
    CapabilityBoundingSet = "";
    NoNewPrivileges = true;
    RestrictSUIDSGID = true;
    PrivateUsers = true;
    # Files: all are read-only but the state directory; /home, devices and other users' temporary files are not there.
    ProtectSystem = "strict";
    ProtectHome = true;
    PrivateTmp = true;
    PrivateDevices = true;
    DevicePolicy = "closed";
    PrivateMounts = true;
    UMask = "0077";
    # The kernel and the machine.
    ProtectKernelModules = true;
    ProtectKernelTunables = true;
    ProtectKernelLogs = true;
    ProtectControlGroups = true;
    ProtectClock = true;
    ProtectHostname = true;
    ProtectProc = "invisible";
    ProcSubset = "pid";
    RestrictNamespaces = true;
    RestrictRealtime = true;
    LockPersonality = true;
    MemoryDenyWriteExecute = true;
    RemoveIPC = true;
    KeyringMode = "private";
    SystemCallArchitectures = "native";
    SystemCallFilter = [
      "@system-service"
      "~@privileged @resources"
    ];
    # A call that is not allowed fails, as it does without the right to it; the program is not killed for it.
    SystemCallErrorNumber = "EPERM";
    # Connection threads, and what stands beside them.
    TasksMax = 2048;
  };

  # Started again whatever ended it, for half a minute, as what it needs may come late when the machine boots; but a
  # program that cannot run must not keep Nix waiting at an open port. Then systemd gives up, and closes the port.
  restarted = {
    Type = "notify";
    Restart = "on-failure";
    RestartSec = 1;
    # A wrong command line stays wrong.
    RestartPreventExitStatus = 2;
    WatchdogSec = 60;
    TimeoutStopSec = 10;
  };
  giveUp = {
    startLimitIntervalSec = 300;
    startLimitBurst = 30;
  };

  proxy = config.networking.proxy or { };
  hasProxy = builtins.any (name: proxy.${name} or null != null) [
    "default"
    "httpProxy"
    "allProxy"
  ];
  noProxyForLoopback = builtins.match "(.*[, ])?(127\\.0\\.0\\.(1|0/8)|\\*)([, ].*)?" (
    toString (proxy.noProxy or "")
  ) != null;

  trackerDir = dirOf tracker.dbPath;
  # systemd makes this one and below; others may be anything, and somebody else's.
  inStateDir = hasPrefix "/var/lib/peerix-tracker/" "${trackerDir}/";
in
{
  # Two copies of this file, as of a flake and of a tarball, are one module.
  key = "github:sophronesis/peerix#nixos-module";

  options.services.peerix = {
    enable = mkEnableOption "peerix, which lets Nix fetch store paths from the stores of the machines around it";

    package = mkPackageOption (
      # nixpkgs has none yet.
      pkgs // { peerix = pkgs.peerix or (pkgs.callPackage ./nix/package.nix { }); }
    ) "peerix" { };

    settings = mkOption {
      type = types.attrsOf (
        types.nullOr (
          types.oneOf [
            types.bool
            types.int
            types.str
            (types.listOf types.str)
          ]
        )
      );
      default = { };
      example = {
        timeout = 100;
        bind = [ "192.168.1.20" ];
      };
      description = ''
        Flags of the program by their names without dashes; see {command}`peerix --help`. `true` gives a flag without
        a value, a list gives the flag once for each element, and `null` or `false` leaves it out. The other options
        set some of these, with less priority.
      '';
    };

    openFirewall = mkOption {
      type = types.bool;
      default = true;
      description = ''
        Open {option}`services.peerix.port` in the firewall, TCP and UDP: UDP to find neighbours and be asked by them,
        TCP to be fetched from. Without, only {option}`services.peerix.peers` and peers of a tracker are found.
      '';
    };

    port = mkOption {
      type = types.port;
      default = 12304;
      description = ''
        Port for the HTTP server (TCP) and peer announcements (UDP). All machines of a network need the same.
      '';
    };

    mode = mkOption {
      type = types.enum [
        "lan"
        "wan"
        "both"
      ];
      default = "lan";
      description = ''
        Where to look for peers, and whom to share with: `"lan"` (neighbours, found by UDP broadcast), `"wan"` (peers
        that a tracker knows), or `"both"`. `"wan"` and `"both"` share with anybody what passes the filter and the
        verification.
      '';
    };

    user = mkOption {
      type = types.either types.str types.int;
      default = "nobody";
      description = ''
        User to run the service as. `"nobody"` stands for a user that systemd makes for this service alone.
      '';
    };

    group = mkOption {
      type = types.either types.str types.int;
      default = "nobody";
      description = "Group to run the service as. `\"nobody\"` stands for the group of the user.";
    };

    privateKeyFile = mkOption {
      type = types.nullOr types.path;
      default = null;
      example = "/etc/nix/peerix.sec";
      description = ''
        Secret key to sign this machine's paths with, as {command}`nix-store --generate-binary-cache-key` writes it.
        systemd reads it; it need not be readable for anybody but root, and must not be in the Nix store. While it is
        missing, what only this key would sign is not shared.
      '';
    };

    publicKeyFile = mkOption {
      type = types.nullOr types.path;
      default = null;
      example = "/etc/nix/peerix.pub";
      description = ''
        File with a public key that this machine's Nix shall trust, or several. It is read whenever nix-daemon starts,
        not when the system is built, so that it may also be a secret that is decrypted at boot.
      '';
    };

    publicKey = mkOption {
      type = types.nullOr types.str;
      default = null;
      example = "myhost-1:dw6gRsgENbg3ZRarDaIEP6t3wwkl5ML26Gov7r1VLrA=";
      description = "Public key that this machine's Nix shall trust.";
    };

    globalCacheTTL = mkOption {
      type = types.nullOr types.ints.unsigned;
      default = null;
      example = 60;
      description = ''
        How long Nix remembers, in seconds, that a substituter has a path or does not have it
        (`narinfo-cache-positive-ttl` and `narinfo-cache-negative-ttl`). This is for all substituters, so that by
        default Nix's own values stay: 30 days and one hour.
      '';
    };

    peers = mkOption {
      type = types.listOf types.str;
      default = [ ];
      example = [
        "build.example.org"
        "10.8.0.2:12304"
      ];
      description = ''
        Nodes beyond the broadcast domain (in another VLAN, in a VPN) to ask, and to share with, like neighbours:
        `host` or `host:port`. Name each other.
      '';
    };

    lanNetworks = mkOption {
      type = types.listOf types.str;
      default = [ ];
      example = [ "100.64.0.0/10" ];
      description = ''
        Networks that belong to the LAN beside the private and link-local ones of this machine's interfaces: a VPN, or
        a network with public addresses. Machines there get every valid path.
      '';
    };

    interfaces = mkOption {
      type = types.listOf types.str;
      default = [ ];
      example = [
        "en*"
        "!eno2"
      ];
      description = ''
        Interfaces whose networks belong to the LAN: names, in which `*` and `?` are wildcards, and with `!` in front
        those to exclude. If no name includes any, these are all interfaces but those of containers and virtual
        machines (`docker*`, `br-*`, `veth*`, `virbr*` and the like).
      '';
    };

    priority = mkOption {
      type = types.ints.unsigned;
      default = 20;
      description = "Order among Nix's substituters, lowest first. cache.nixos.org has 40.";
    };

    enableIPv6 = mkOption {
      type = types.bool;
      default = false;
      description = "Serve and look for peers on IPv6 too, in link-local and unique local networks.";
    };

    extraFlags = mkOption {
      type = types.listOf types.str;
      default = [ ];
      example = [
        "--timeout=100"
        "--tracker-url=http://tracker2.example:12305"
      ];
      description = "Further arguments; see {command}`peerix --help`.";
    };

    trackerUrl = mkOption {
      type = types.nullOr types.str;
      default = null;
      example = "http://tracker.example:12305";
      description = ''
        URL of the peerix tracker server. Required for modes `"wan"` and `"both"`; more of them can be added by
        {option}`services.peerix.extraFlags`.
      '';
    };

    announceAddr = mkOption {
      type = types.nullOr types.str;
      default = null;
      example = "home.example.org:20001";
      description = ''
        Address to announce to the tracker, `host` or `host:port`, instead of the one it sees: for machines behind NAT
        or in a VPN.
      '';
    };

    peerId = mkOption {
      type = types.nullOr types.str;
      default = null;
      description = "Unique peer ID. Made of the machine's identity key, which is kept in the state directory, if not set.";
    };

    upstreamCache = mkOption {
      type = types.str;
      default = "https://cache.nixos.org";
      description = "Upstream cache URL for hash verification: what it has too may be shared with anybody.";
    };

    noVerify = mkOption {
      type = types.bool;
      default = false;
      description = "Share with anybody also what the upstream cache does not have, in modes with WAN.";
    };

    noFilter = mkOption {
      type = types.bool;
      default = false;
      description = "Share with anybody whatever the name, in modes with WAN.";
    };

    noDefaultFilters = mkOption {
      type = types.bool;
      default = false;
      description = "Keep filtering by name, but without the built-in patterns.";
    };

    filterPatterns = mkOption {
      type = types.listOf types.str;
      default = [ ];
      example = [ "*-internal-*" ];
      description = "Additional patterns (as in Python's `fnmatch`) of names to exclude from WAN sharing.";
    };

    friends = mkOption {
      type = types.listOf types.str;
      default = [ ];
      example = [ "laptop=ed25519:BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc=" ];
      description = ''
        Machines that may have every path, wherever they are: `NAME=KEY[@HOST[:PORT]][,sign=NAME:KEY]`, with the key
        that {command}`peerix identity` prints there. Name each other. What is signed by the key after `sign=` is
        trusted by this machine's Nix too.
      '';
    };

    share = mkOption {
      type = types.enum [
        "all"
        "lan"
        "friends"
        "nobody"
      ];
      default = "all";
      description = "How much is shared of what the mode shares: all, nothing beyond the LAN, with friends alone, or nothing.";
    };

    uploadLimit = mkOption {
      type = types.nullOr types.str;
      default = null;
      example = "2M";
      description = "Bytes a second that are sent to other machines.";
    };

    mapPort = mkOption {
      type = types.bool;
      default = false;
      description = ''
        Have the router let friends in, by PCP or NAT-PMP. It passes on to the port two above
        {option}`services.peerix.port`, which is opened in the firewall too.
      '';
    };

    tracker = {
      enable = mkEnableOption "the peerix tracker, through which peers on different networks find one another";

      port = mkOption {
        type = types.port;
        default = 12305;
        description = "Port for the tracker server (TCP).";
      };

      dbPath = mkOption {
        type = types.str;
        default = "/var/lib/peerix-tracker/tracker.db";
        description = "Path to the tracker's SQLite database. Its directory is made if it is not there.";
      };

      openFirewall = mkOption {
        type = types.bool;
        default = true;
        description = "Open the firewall for the tracker's port.";
      };
    };
  };

  config = mkMerge [
    (mkIf cfg.enable {
      assertions = [
        {
          assertion = cfg.settings.mode == "lan" || cfg.settings.tracker-url or [ ] != [ ];
          message = ''
            services.peerix.mode is "${cfg.mode}", which needs a tracker: set services.peerix.trackerUrl, for example to "http://tracker.example:12305", or mode to "lan".'';
        }
        {
          assertion = cfg.publicKey == null || isPublicKeys cfg.publicKey;
          message = "services.peerix.publicKey (${toString cfg.publicKey}) is no public key: set it to what nix-store --generate-binary-cache-key writes, NAME:KEY with 44 characters of base64.";
        }
        {
          assertion = !tracker.enable || tracker.port != cfg.port;
          message = "services.peerix.port and services.peerix.tracker.port are both ${toString cfg.port}: set one of them to another.";
        }
        {
          assertion = cfg.settings.port == cfg.port;
          message = "services.peerix.settings.port is not what systemd listens on: set services.peerix.port instead.";
        }
        {
          assertion =
            ownUser || builtins.match "[0-9]+" (toString cfg.user) != null || (config.users.users or { }) ? ${cfg.user};
          message = "services.peerix.user (${toString cfg.user}) is no user of this machine: define users.users.${toString cfg.user}, or leave the option at its default for a user that systemd makes.";
        }
        {
          assertion = cfg.privateKeyFile == null || !isInStore cfg.privateKeyFile;
          message = ''
            services.peerix.privateKeyFile is in the Nix store (${toString cfg.privateKeyFile}), which every user and every peer can read: set it to a path outside, as a string, for example "/etc/nix/peerix.sec".'';
        }
      ]
      ++ lib.concatMap urlAssertions [
        "tracker-url"
        "upstream-cache"
      ];

      # The port belongs to systemd and stays open while the daemon restarts: up to 2.31, a Nix that knows a cache and
      # finds its port closed fails the build.
      systemd.sockets.${socket} = {
        description = "Port of the peer-to-peer Nix binary cache";
        wantedBy = [ "sockets.target" ];
        socketConfig = rec {
          ListenStream = [ "0.0.0.0:${toString cfg.port}" ] ++ optional cfg.enableIPv6 "[::]:${toString cfg.port}";
          ListenDatagram = ListenStream;
          BindIPv6Only = "ipv6-only";
          Backlog = 1024;
          Service = "peerix.service";
        };
      };

      systemd.services.peerix = giveUp // {
        description = "Peer-to-peer Nix binary cache";
        documentation = [ "https://github.com/sophronesis/peerix" ];
        wantedBy = [ "multi-user.target" ];
        requires = [ "${socket}.socket" ];
        wants = [ "nix-daemon.socket" ];
        after = [
          "network.target"
          "${socket}.socket"
          "nix-daemon.socket"
        ];
        # Stopping it before the new one starts would close the socket too.
        stopIfChanged = false;
        serviceConfig =
          hardened
          // restarted
          // {
            # Opens and closes the Nix database as root, which leaves behind the files that are needed to read it as
            # another user (Nix 2.26 or later). Where that fails, peerix has other ways.
            ExecStartPre = "+-${config.nix.package}/bin/nix-store --check-validity";
            ExecStart =
              commandLine "peerix" (lib.concatLists (mapAttrsToList flags cfg.settings) ++ cfg.extraFlags)
              # systemd puts the directory in the place of %d.
              + lib.optionalString (cfg.privateKeyFile != null) " --private-key=%d/private-key";
            StateDirectory = "peerix";
            StateDirectoryMode = "0700";
            # systemd reads it as root and shows it to this unit alone: systemd.exec(5), credentials.
            LoadCredential = optional (
              cfg.privateKeyFile != null
            ) "private-key:${pathSetting cfg.privateKeyFile}";
            # In its place if it is not there. Without, the unit would fail, and with the port every build.
            SetCredential = optional (cfg.privateKeyFile != null) "private-key:missing";
            # As many as peerix takes for 1,024 connections and their streams.
            LimitNOFILE = 8192;
            # Netlink tells which networks this machine is in; the Unix socket is nix-daemon's and systemd's.
            RestrictAddressFamilies = [
              "AF_INET"
              "AF_INET6"
              "AF_NETLINK"
              "AF_UNIX"
            ];
          }
          // (
            if ownUser then
              {
                DynamicUser = true;
                User = "peerix";
              }
            else
              { User = toString cfg.user; }
          )
          // lib.optionalAttrs (toString cfg.group != "nobody") { Group = toString cfg.group; };
      };

      services.peerix.settings = {
        port = mkDefault cfg.port;
        mode = mkDefault cfg.mode;
        priority = mkDefault cfg.priority;
        # Lists add to those that are set here; where there is none, one value may stand without a list.
        peer = mkIf (cfg.peers != [ ]) cfg.peers;
        lan = mkIf (cfg.lanNetworks != [ ]) cfg.lanNetworks;
        interface = mkIf (cfg.interfaces != [ ]) cfg.interfaces;
        tracker-url = mkIf (cfg.trackerUrl != null && cfg.trackerUrl != "") [ cfg.trackerUrl ];
        announce-addr = mkDefault cfg.announceAddr;
        peer-id = mkDefault cfg.peerId;
        friend = mkIf (cfg.friends != [ ]) cfg.friends;
        share = mkIf (cfg.share != "all") (mkDefault cfg.share);
        upload-limit = mkDefault cfg.uploadLimit;
        map-port = mkDefault cfg.mapPort;
        upstream-cache = mkDefault cfg.upstreamCache;
        no-verify = mkDefault cfg.noVerify;
        no-filter = mkDefault cfg.noFilter;
        no-default-filters = mkDefault cfg.noDefaultFilters;
        filter-patterns = mkIf (cfg.filterPatterns != [ ]) cfg.filterPatterns;
      };

      # nix-daemon asks peerix by the proxy otherwise.
      networking.proxy = mkIf hasProxy { noProxy = mkDefault "127.0.0.1,localhost,::1"; };
      warnings = optional (hasProxy && !noProxyForLoopback) ''
        networking.proxy.noProxy does not have 127.0.0.1, so that Nix asks services.peerix by the proxy: add it.'';

      nix.settings = mkMerge [
        { extra-substituters = [ "http://127.0.0.1:${toString cfg.port}" ]; }
        (mkIf (cfg.publicKey != null) { extra-trusted-public-keys = [ cfg.publicKey ]; })
        (mkIf (friendKeys != [ ]) { extra-trusted-public-keys = friendKeys; })
        (mkIf (cfg.globalCacheTTL != null) {
          narinfo-cache-positive-ttl = cfg.globalCacheTTL;
          narinfo-cache-negative-ttl = cfg.globalCacheTTL;
        })
      ];

      networking.firewall = mkIf cfg.openFirewall {
        # The router passes on to the port two further: src/sockets.rs.
        allowedTCPPorts = [ cfg.port ] ++ optional cfg.mapPort (cfg.port + 2);
        allowedUDPPorts = [ cfg.port ];
      };
    })

    # A key that comes late, or is put back, is taken without anybody's doing: peerix cannot read it, and systemd reads it
    # when it starts.
    (mkIf (cfg.enable && cfg.privateKeyFile != null) {
      systemd.paths.peerix-key = {
        description = "Secret key of the peer-to-peer Nix binary cache";
        wantedBy = [ "multi-user.target" ];
        pathConfig.PathChanged = pathSetting cfg.privateKeyFile;
      };
      systemd.services.peerix-key = {
        description = "Secret key of peerix has changed";
        serviceConfig.Type = "oneshot";
        # A key is often written in steps.
        serviceConfig.ExecStart = "${config.systemd.package}/bin/systemctl try-restart peerix.service";
      };
    })

    (mkIf (cfg.enable && cfg.publicKeyFile != null) {
      # A file that is not there when Nix starts is no error: then the key is not trusted.
      nix.extraOptions = ''
        !include ${publicKeyDir}/nix.conf
      '';
      # nix-daemon reads its configuration when it starts.
      systemd.services.nix-daemon = mkIf (config.nix.enable or true) { restartTriggers = [ publicKeyFile ]; };
      systemd.services.peerix-public-key = {
        description = "Public key of services.peerix.publicKeyFile for nix.conf";
        wantedBy = [
          "multi-user.target"
          "nix-daemon.service"
        ];
        before = [
          "nix-daemon.service"
          "peerix.service"
        ];
        # And is read again whenever that is restarted.
        partOf = [ "nix-daemon.service" ];
        # One line, whatever is in the file: these are keys, and must not become another setting.
        script = ''
          keys=$(tr -s '\r\n' '  ' < "$CREDENTIALS_DIRECTORY/public-key")
          printf 'extra-trusted-public-keys = %s\n' "$keys" > ${publicKeyDir}/nix.conf
        '';
        # As root, but without its powers: every user's Nix reads the file, which in the directory of a user that
        # systemd makes (/run/private) it could not.
        serviceConfig = hardened // {
          Type = "oneshot";
          RemainAfterExit = true;
          RuntimeDirectory = "peerix-public-key";
          RuntimeDirectoryMode = "0755";
          UMask = "0022";
          LoadCredential = [ "public-key:${pathSetting publicKeyFile}" ];
          PrivateNetwork = true;
          RestrictAddressFamilies = "none";
          IPAddressDeny = "any";
        };
      };
    })

    (mkIf tracker.enable {
      assertions = [
        {
          # systemd and its tmpfiles read directories each in its own way: none of them needs these characters quoted.
          assertion =
            builtins.match "(/[A-Za-z0-9_@-][A-Za-z0-9._@-]*){2,}" tracker.dbPath != null
            && !builtins.elem trackerDir [
              "/etc"
              "/home"
              "/root"
              "/run"
              "/srv"
              "/tmp"
              "/var"
              "/var/lib"
            ];
          message = "services.peerix.tracker.dbPath (${tracker.dbPath}) has to be an absolute path of plain characters, in a directory of the tracker's own, for example \"/var/lib/peerix-tracker/tracker.db\".";
        }
      ];

      systemd.services.peerix-tracker = giveUp // {
        description = "Tracker of the peer-to-peer Nix binary cache";
        documentation = [ "https://github.com/sophronesis/peerix" ];
        wantedBy = [ "multi-user.target" ];
        after = [ "network.target" ];
        serviceConfig =
          hardened
          // restarted
          // {
            ExecStart = commandLine "peerix-tracker" [
              "--port=${toString tracker.port}"
              "--db-path=${tracker.dbPath}"
            ];
            User = "peerix-tracker";
            LimitNOFILE = 8192;
            RestrictAddressFamilies = [
              "AF_INET"
              "AF_INET6"
              "AF_UNIX"
            ];
          }
          // (
            if inStateDir then
              {
                DynamicUser = true;
                StateDirectory = removePrefix "/var/lib/" trackerDir;
                StateDirectoryMode = "0700";
              }
            else
              { ReadWritePaths = [ trackerDir ]; }
          );
      };

      networking.firewall.allowedTCPPorts = mkIf tracker.openFirewall [ tracker.port ];
    })

    # Elsewhere the directory has to belong to a user that stays. One that is there already is left as it is (the colons).
    (mkIf (tracker.enable && !inStateDir) {
      users.users.peerix-tracker = {
        isSystemUser = true;
        group = "peerix-tracker";
        description = "Tracker of peerix";
      };
      users.groups.peerix-tracker = { };
      systemd.tmpfiles.rules = [ "d ${trackerDir} :0700 :peerix-tracker :peerix-tracker -" ];
    })
  ];
}
