//! Any text as an image reference, a blob URL or a URL: what is taken is written as it was read.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ovbd_vhost::registry::reference::Reference;
use ovbd_vhost::registry::repository::Repository;
use ovbd_vhost::registry::url::Url;

fuzz_target!(|bytes: &[u8]| {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    if let Ok(reference) = text.parse::<Reference>() {
        assert_eq!(reference.to_string().parse(), Ok(reference.clone()));
        let repository = reference.repository();
        assert_eq!(
            Repository::from_blob_url(&repository.blob_url()).as_ref(),
            Ok(repository)
        );
        let path = repository.manifest_path(&reference.selector());
        assert!(path.starts_with("/v2/") && !path.contains("/../"));
    }
    if let Ok(repository) = Repository::from_blob_url(text) {
        assert!(Url::parse(&repository.blob_url()).is_ok());
    }
    if let Ok(url) = Url::parse(text) {
        assert_eq!(Url::parse(&url.to_string()), Ok(url));
    }
    let base = Url::parse("https://r.example/v2/a/blobs/x?q").expect("a URL");
    if let Ok(url) = base.join(text) {
        assert!(url.path().starts_with('/'));
    }
});
