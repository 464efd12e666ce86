#!/usr/bin/env bash
# Install the controller as a service on a robot (Ubuntu 22.04 with Humble, 24.04 with Jazzy; x86-64 or Jetson).
#   sudo deploy/install.sh laws_ros-0.1.0-py3-none-any.whl arm arm.zip
# WHEEL from `pip wheel --no-deps .`, NAME of the robot, BUNDLE from `laws bundle`. Run again, it updates.
set -euo pipefail

if [ $# -ne 3 ]; then
    echo "usage: $0 WHEEL NAME BUNDLE" >&2
    exit 2
fi
wheel=$1 name=$2 bundle=$3
here=$(cd "$(dirname "$0")" && pwd)
for file in "$wheel" "$bundle"; do
    [ -f "$file" ] || { echo "$0: $file: no such file" >&2; exit 2; }
done
[[ $name =~ ^[a-z][a-z0-9_]*$ ]] || { echo "$0: robot name '$name': lower-case letters, digits, _" >&2; exit 2; }
[ "$(id -u)" = 0 ] || { echo "$0: run it as root (sudo)" >&2; exit 2; }
distro=${ROS_DISTRO:-$(ls /opt/ros 2>/dev/null | tail -n 1)}
[ -f "/opt/ros/$distro/setup.bash" ] || { echo "$0: no ROS 2 in /opt/ros: install Humble or Jazzy first" >&2; exit 2; }

id laws >/dev/null 2>&1 || useradd --system --home-dir /var/lib/laws --shell /usr/sbin/nologin laws
install -d -o laws -g laws /var/lib/laws /etc/laws
install -d /opt/laws
# rclpy comes from ROS; everything else from wheels, apart from the system's Python packages.
[ -x /opt/laws/venv/bin/python ] || python3 -m venv --system-site-packages /opt/laws/venv
/opt/laws/venv/bin/pip install --quiet --upgrade "$wheel"
cat > /opt/laws/run.new <<RUN
#!/usr/bin/env bash
# Written by deploy/install.sh: a command with ROS and this project's Python in its environment.
source /opt/ros/$distro/setup.bash
export PATH=/opt/laws/venv/bin:\$PATH
exec "\$@"
RUN
chmod 755 /opt/laws/run.new
mv /opt/laws/run.new /opt/laws/run
runuser -u laws -- /opt/laws/run laws install "$bundle" --into "/var/lib/laws/$name"
install -m 644 "$here/laws@.service" "$here/laws-learner@.service" /etc/systemd/system/
systemctl daemon-reload
systemctl enable "laws@$name"
systemctl restart "laws@$name"
systemctl --no-pager --lines 5 status "laws@$name"
