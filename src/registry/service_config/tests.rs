//! Tests of the service configuration.

use super::*;

fn parse(text: &str) -> Result<ServiceConfig, Error> {
    ServiceConfig::parse(text.as_bytes(), Path::new("F"))
}

#[test]
fn the_keys_that_matter_are_taken() {
    let config = parse(
        r#"{
        "logLevel": 1, "ioEngine": 0, "exporterConfig": {"enable": false},
        "credentialConfig": {"mode": "uds", "path": "/run/c.sock", "timeout": 3},
        "cacheConfig": {"cacheType": "file", "cacheDir": "/c", "cacheSizeGB": 7, "refillSize": 262144},
        "registryCacheDir": "/old", "registryCacheSizeGB": 9,
        "download": {"enable": true, "delay": 600, "maxMBps": 10},
        "p2pConfig": {"enable": true, "address": "localhost:19145/dadip2p"},
        "prefetchConfig": {"concurrency": 8},
        "certConfig": {"certFile": "/a.crt", "keyFile": "/a.key"},
        "userAgent": "x/1 (y)"
    }"#,
    )
    .unwrap();
    assert!(matches!(config.credentials, Source::Service(_)));
    assert_eq!(config.cache_dir.as_deref(), Some(Path::new("/c")));
    assert_eq!(config.cache_size, Some(7 << 30));
    assert_eq!(config.refill_size, Some(262_144));
    let download = config.download.unwrap();
    assert!(download.enabled());
    assert_eq!(download.delay(), Duration::from_secs(600));
    assert_eq!(download.delay_extra(), Duration::from_secs(30));
    assert_eq!((download.rate(), download.attempts()), (Some(10 << 20), 5));
    assert!(config.p2p.is_some());
    assert_eq!(config.prefetch_concurrency, Some(8));
    assert!(config.certificate.is_some());
    assert_eq!(config.user_agent.as_deref(), Some("x/1 (y)"));
}

#[test]
fn older_names_hold_where_the_newer_say_nothing() {
    let config = parse(
        r#"{"credentialFilePath":"/opt/overlaybd/cred.json","registryCacheDir":"/old","registryCacheSizeGB":9}"#,
    )
    .unwrap();
    assert!(matches!(config.credentials, Source::File(path) if path.ends_with("cred.json")));
    assert_eq!(config.cache_dir.as_deref(), Some(Path::new("/old")));
    assert_eq!(config.cache_size, Some(9 << 30));

    let empty = parse("{}").unwrap();
    let is_there = Path::new(DEFAULT_CREDENTIALS).exists();
    assert_eq!(matches!(empty.credentials, Source::None), !is_there);
    let none = parse(r#"{"credentialFilePath":""}"#).unwrap();
    assert!(matches!(none.credentials, Source::None));
    assert!(empty.download.is_none() && empty.p2p.is_none() && empty.cache_dir.is_none());
    let off = parse(r#"{"p2pConfig":{"enable":false,"address":"http://far.example"}}"#).unwrap();
    assert!(off.p2p.is_none());
    let on = parse(r#"{"p2pConfig":{"enable":true}}"#).unwrap();
    assert_eq!(on.p2p, Some("localhost:9731/accelerator".parse().unwrap()));
}

#[test]
fn values_that_cannot_be_used_are_refused() {
    for text in [
        "",
        "[]",
        "{",
        r#"{"download":5}"#,
        r#"{"download":{"delay":-1}}"#,
        r#"{"cacheConfig":{"refillSize":1000}}"#,
        r#"{"cacheConfig":{"refillSize":0}}"#,
        r#"{"cacheConfig":{"refillSize":9223372036854775808}}"#,
        r#"{"credentialConfig":{"mode":"ftp"}}"#,
        r#"{"credentialConfig":{"mode":"http","path":""}}"#,
        r#"{"credentialConfig":{"mode":"https","path":"h/x","client_cert_path":"/a"}}"#,
        r#"{"credentialConfig":{"mode":"https","path":"h/x","server_ca_path":"/no/such/file"}}"#,
        r#"{"p2pConfig":{"enable":true,"address":"http://far.example?x"}}"#,
        r#"{"p2pConfig":{"enable":true,"address":""}}"#,
        r#"{"certConfig":{"certFile":"/a"}}"#,
        "{\"userAgent\":\"a\\r\\nb\"}",
    ] {
        assert!(parse(text).is_err(), "{text}");
    }
    let extreme = parse(
        r#"{"cacheConfig":{"cacheSizeGB":18446744073709551615},
            "prefetchConfig":{"concurrency":4294967295},
            "download":{"maxMBps":0,"tryCnt":0,"blockSize":18446744073709551615}}"#,
    )
    .unwrap();
    assert_eq!(extreme.cache_size, Some(u64::MAX));
    assert_eq!(extreme.prefetch_concurrency, Some(MAX_CONCURRENCY));
    let download = extreme.download.unwrap();
    assert_eq!((download.rate(), download.attempts()), (None, 1));
    assert_eq!(download.block_size(), 64 << 20);
}

#[test]
fn a_file_is_read_within_its_bound() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("overlaybd.json");
    assert!(matches!(
        ServiceConfig::load(&path),
        Err(Error::Read { .. })
    ));
    std::fs::write(&path, "{}").unwrap();
    assert!(ServiceConfig::load(&path).is_ok());
    std::fs::write(&path, vec![b' '; MAX_CONFIG as usize + 1]).unwrap();
    assert!(matches!(
        ServiceConfig::load(&path),
        Err(Error::Read { .. })
    ));
}

#[test]
fn keys_without_effect_are_named_and_unknown_kinds_of_cache_refused() {
    let ignored = |text: &str| {
        let ignored = parse(text).unwrap().ignored;
        ignored.map_or(Vec::new(), |(_, keys)| keys)
    };
    let full = r#"{"logConfig": {"logLevel": 1}, "ioEngine": 1, "gzipCacheConfig": {"enable": false},
        "exporterConfig": {"enable": true, "port": 9863}, "p2pConfig": {"enable": false, "port": 1},
        "cacheConfig": {"cacheType": "ocf", "blockSize": 65536}, "download": {"tryCnt": 5, "trycnt": 5}}"#;
    assert_eq!(
        ignored(full),
        [
            r#"cacheConfig.cacheType "ocf" (the cache is as for "file")"#,
            "cacheConfig.blockSize",
            "download.trycnt",
            "exporterConfig",
            "ioEngine",
            "logConfig",
            "p2pConfig.port",
        ]
    );
    assert!(ignored(r#"{"cacheConfig": {"cacheType": "file"}, "cacheType": "ocf"}"#).is_empty());
    assert_eq!(ignored(r#"{"cacheType": "download"}"#).len(), 1);
    let long = format!(r#"{{"{}": 1}}"#, "k".repeat(1000));
    assert_eq!(ignored(&long), [format!("{}...", "k".repeat(60))]);
    assert_eq!(ignored(r#"{"a\nb": 1}"#), ["a\\nb"]);
    let many: Vec<_> = (0..100).map(|number| format!(r#""k{number}":0"#)).collect();
    let many = ignored(&format!("{{{}}}", many.join(",")));
    assert_eq!((many.len(), many.last().unwrap().as_str()), (33, "68 more"));
    for text in [
        r#"{"cacheConfig": {"cacheType": "nfs"}}"#,
        r#"{"cacheType": "nfs"}"#,
        r#"{"cacheConfig": {"cacheType": 5}}"#,
    ] {
        assert!(parse(text).is_err(), "{text}");
    }
}
