"""Settings of the service from the environment."""

from pydantic import SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


class ServiceSettings(BaseSettings):
    """The variables `CLIPVISIONALIGN_*` that the service reads.

    Attributes:
        token: CLIPVISIONALIGN_TOKEN, required of every request but /health; "" for none.
    """

    model_config = SettingsConfigDict(env_prefix="CLIPVISIONALIGN_")

    token: SecretStr = SecretStr("")
