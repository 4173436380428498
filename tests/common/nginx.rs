//! Debian's `nginx`, in front of a registry or as a store of blobs.

use std::fs;
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use crate::registries::{free_address, server_program};
use crate::registry_server::until;

/// An `nginx` process, until it is dropped.
pub struct Nginx {
    child: Child,
    host: String,
    folder: TempDir,
}

impl Nginx {
    /// Starts it with these directives in its one `server`, and these files in its root.
    pub fn start(http: &str, server: &str, files: &[(&str, &[u8])]) -> Nginx {
        Nginx::launch(http, "", server, files)
    }

    /// The same over TLS.
    pub fn start_tls(certificate: &Path, key: &Path, server: &str) -> Nginx {
        let tls = format!(
            "ssl_certificate {};\nssl_certificate_key {};\n{server}",
            certificate.display(),
            key.display()
        );
        Nginx::launch("", "ssl", &tls, &[])
    }

    fn launch(http: &str, listen: &str, server: &str, files: &[(&str, &[u8])]) -> Nginx {
        let folder = tempfile::tempdir().expect("a folder");
        let root = folder.path().join("root");
        fs::create_dir(&root).expect("a folder");
        for (name, bytes) in files {
            let path = root.join(name);
            fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
            fs::write(path, bytes).expect("a file");
        }
        let host = free_address();
        let folders = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"];
        let folders = folders
            .map(|name| format!("{name}_temp_path {name};\n"))
            .concat();
        let config = format!(
            "daemon off;\nmaster_process off;\npid pid;\nerror_log log;\nevents {{}}\nhttp {{\n\
             access_log off;\n{folders}{http}\nserver {{\nlisten {host} {listen};\n\
             root root;\n{server}\n}}\n}}\n"
        );
        let path = folder.path().join("nginx.conf");
        fs::write(&path, config).expect("a config");
        let child = Command::new(server_program("usr/sbin/nginx"))
            .arg("-p")
            .arg(folder.path())
            .arg("-c")
            .arg(&path)
            .args(["-e", "log"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("nginx");
        let nginx = Nginx {
            child,
            host,
            folder,
        };
        until("nginx listens", || TcpStream::connect(&nginx.host).is_ok());
        nginx
    }

    /// `HOST:PORT`.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// What it logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
