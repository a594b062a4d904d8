"""All checks of `gptutor doctor`, in the order in which their findings are shown."""

from gptutor.diagnosis import database, files, listeners, partners
from gptutor.diagnosis.findings import Check, in_thread

CHECKS = (
    Check("settings", in_thread(files.configuration)),
    Check("files", in_thread(files.files)),
    Check("credentials", in_thread(files.credentials)),
    Check("disk", in_thread(files.disk)),
    Check("memory", in_thread(files.memory)),
    Check("database", database.server),
    Check("migrations", database.schema),
    Check("secret", database.secret),
    Check("clock", partners.clock),
    Check("OpenRouter", partners.openrouter),
    Check("VK", partners.vk_secret),
    Check("YooKassa", partners.payments),
    Check("service", listeners.service),
    Check("ports", listeners.ports),
    Check("limits", listeners.limits),
    Check("TLS", listeners.public_address, timeout_s=30),
)
